// Compares driver.h with NVIDIA's declarations. Compiled where cuda.h is found; contains no code.
#include <cuda.h>

#include <type_traits>

#include "cuda/driver.h"

namespace moeinf::cuda {
namespace {

// True if both types are passed and laid out in the same way. driver.h uses int for an enum and
// void* for a handle; structs are compared below.
template <typename Ours, typename Theirs>
constexpr bool alike() {
    if constexpr (std::is_same_v<Ours, Theirs>) {
        return true;
    } else if constexpr (std::is_enum_v<Theirs>) {
        return std::is_integral_v<Ours> && sizeof(Ours) == sizeof(Theirs);
    } else if constexpr (std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>) {
        using Our = std::remove_pointer_t<Ours>;
        using Their = std::remove_pointer_t<Theirs>;
        if constexpr (std::is_const_v<Our> != std::is_const_v<Their>) {
            return false;
        } else if constexpr (std::is_void_v<Our>) {
            return std::is_class_v<Their>;  // a handle: a pointer to an opaque struct
        } else {
            return alike<std::remove_cv_t<Our>, std::remove_cv_t<Their>>();
        }
    } else if constexpr (std::is_class_v<Ours> && std::is_class_v<Theirs>) {
        return sizeof(Ours) == sizeof(Theirs) && alignof(Ours) == alignof(Theirs);
    } else {
        return false;
    }
}

template <typename Ours, typename Theirs>
struct SameCall : std::false_type {};

template <typename... Ours, typename... Theirs>
    requires(sizeof...(Ours) == sizeof...(Theirs))
struct SameCall<Result(Ours...), CUresult(Theirs...)>
    : std::bool_constant<(alike<Ours, Theirs>() && ...)> {};

#define MOEINF_CHECK(member, exported, parameters)                                             \
    static_assert(SameCall<Result parameters, std::remove_pointer_t<decltype(&::exported)>>(), \
                  #exported " is declared otherwise in cuda.h");
MOEINF_DRIVER_FUNCTIONS(MOEINF_CHECK)
#undef MOEINF_CHECK

#define MOEINF_SAME_PLACE(ours, our_field, theirs, their_field) \
    static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field))
MOEINF_SAME_PLACE(MemoryLocation, type, CUmemLocation, type);
MOEINF_SAME_PLACE(MemoryLocation, id, CUmemLocation, id);
MOEINF_SAME_PLACE(MemoryProperties, type, CUmemAllocationProp, type);
MOEINF_SAME_PLACE(MemoryProperties, location, CUmemAllocationProp, location);
MOEINF_SAME_PLACE(MemoryProperties, flags, CUmemAllocationProp, allocFlags);
MOEINF_SAME_PLACE(MemoryAccess, location, CUmemAccessDesc, location);
MOEINF_SAME_PLACE(MemoryAccess, flags, CUmemAccessDesc, flags);

static_assert(kNoDevice == CUDA_ERROR_NO_DEVICE && kNotReady == CUDA_ERROR_NOT_READY);
static_assert(kCaptureRelaxed == CU_STREAM_CAPTURE_MODE_RELAXED);
static_assert(kAllocationPinned == CU_MEM_ALLOCATION_TYPE_PINNED);
static_assert(kLocationDevice == CU_MEM_LOCATION_TYPE_DEVICE);
static_assert(kAccessReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(kGranularityMinimum == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
static_assert(kRegisterPortable == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(kRegisterDeviceMap == CU_MEMHOSTREGISTER_DEVICEMAP);
static_assert(kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(kAttributeMultiprocessors == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(kAttributeVirtualMemory == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
static_assert(kAttributeHostPointersAreDevicePointers ==
              CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM);

}  // namespace
}  // namespace moeinf::cuda
