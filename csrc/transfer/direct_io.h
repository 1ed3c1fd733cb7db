// Whether a file can be read past the page cache, and how reads must be aligned for it. Found by
// trying: what a file system says and what it does are not always the same.
#pragma once

#include <cstddef>

namespace moeinf {

// Sets O_DIRECT on an open, readable file. Returns the alignment that offsets, lengths and
// addresses then need (a power of two above 1), or 1, with the file as it was, where the file
// system does not support it.
[[nodiscard]] size_t enable_direct_io(int descriptor);

}  // namespace moeinf
