// Whether a file can be read past the page cache, and the alignment that such reads need. Found by
// trying, because a file system's statement is not always true.
#pragma once

#include <cstddef>

namespace moeinf {

// Sets O_DIRECT on an open, readable file. Returns the alignment that offsets, lengths and
// addresses then need (a power of two above 1). Returns 1 and leaves the file unchanged if the file
// system does not support direct reads.
[[nodiscard]] size_t enable_direct_io(int descriptor);

}  // namespace moeinf
