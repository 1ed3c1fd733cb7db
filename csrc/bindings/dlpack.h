// Hands a slot pool to torch, numpy and others without a copy, by the DLPack protocol.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "device/device.h"
#include "memory/slot_pool.h"

namespace moeinf {

// A capsule named "dltensor" of uint8 [rows, slot_bytes], a view of the pool that keeps it alive.
// `device`: where the pool lies; null: in RAM. `holds`: the rows keep their memory when the pool
// shrinks. Otherwise only rows of slots that a lease holds may be touched.
pybind11::capsule to_dlpack(std::shared_ptr<const SlotPool> pool, const Device* device, bool holds);

// DLPack's (device type, device index); RAM for null and for a fake device.
pybind11::tuple dlpack_device(const Device* device);

}  // namespace moeinf
