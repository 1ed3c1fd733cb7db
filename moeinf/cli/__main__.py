from moeinf.cli import main

main()
