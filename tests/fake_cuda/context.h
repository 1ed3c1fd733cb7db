// The one device, its primary context, and which threads have it current.
#pragma once

namespace fake {

bool initialized_here();  // by this process, not one it was forked from
bool context_is_current();

}  // namespace fake
