"""What is on disk: headers, configuration, families of names, formats, layout, the store."""
