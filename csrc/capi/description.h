// The description of a checkpoint's experts: a text that ExpertStore.describe() of Python writes,
// because the rules for names in checkpoints are Python's. One fact a line, its words separated by
// one space; what may hold spaces comes last:
//
//     moeinf experts 1                                       the version of this format
//     shape LAYERS EXPERTS SLOT_BYTES
//     function NAME ACTIVATION ALPHA LIMIT
//     matrix gate|up|down FORMAT ROWS COLS OFFSET STRIDE     then what the matrix has beside it:
//     scales TYPE OFFSET STRIDE BLOCK_ROWS BLOCK_COLS
//     zeros OFFSET STRIDE
//     multiplier OFFSET
//     bias DTYPE OFFSET STRIDE
//     file BYTES MODIFIED_NS PATH
//     held HEX NAME                                          bytes that are in no file
//     transpose OFFSET ROWS COLS ELEMENT
//     check OFFSET BYTES TYPE NEGATIVE STEP
//     zero_points OFFSET BYTES                               that must be from -8 to 7
//     recode KIND OFFSET ROWS COLS BITS PLUS
//     extent FILE OFFSET BYTES SLOT_OFFSET                   in order of experts
//     end
#pragma once

#include <string>

#include "capi/objects.h"

namespace moeinf::capi {

// Throws Error(kRead) for a file that is missing, incomplete, or describes files that have changed
// since; it names the file and the line.
[[nodiscard]] Store read_description(const std::string& path);

}  // namespace moeinf::capi
