// The devices, their primary contexts, and which of them a thread has current.
#pragma once

namespace fake {

bool initialized_here();  // by this process, not one it was forked from
int current_device();     // of the calling thread; -1: none

}  // namespace fake
