// Hands a slot pool to torch, numpy and others without a copy, by the DLPack protocol.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "device/device.h"
#include "memory/slot_pool.h"

namespace moeinf {

// A capsule named "dltensor" of uint8 [rows, slot_bytes] that keeps the pool alive. `rows` must not
// exceed the pool's usable slots. `device`: where the pool lies; null: in RAM.
pybind11::capsule to_dlpack(std::shared_ptr<const SlotPool> pool, int32_t rows,
                            const Device* device);

// DLPack's (device type, device index); RAM for null and for a fake device.
pybind11::tuple dlpack_device(const Device* device);

}  // namespace moeinf
