// The structures that DLPack's specification fixes. Frameworks pass tensors in them.
#pragma once

#include <cstdint>

namespace moeinf {

struct DLDevice {
    int32_t device_type;
    int32_t device_id;
};
struct DLDataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};
struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements; null: rows without gaps
    uint64_t byte_offset;
};
struct DLManagedTensor {
    DLTensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(DLManagedTensor*);
};

struct DLPackVersion {
    uint32_t major;
    uint32_t minor;
};
struct DLManagedTensorVersioned {
    DLPackVersion version;
    void* manager_ctx;
    void (*deleter)(DLManagedTensorVersioned*);
    uint64_t flags;
    DLTensor dl_tensor;
};

// The table of functions behind a type's `__dlpack_c_exchange_api__`; those that come after these
// are not used.
struct DLPackExchange {
    DLPackVersion version;
    DLPackExchange* older;
    void* allocate;
    void* owned_from_object;
    int (*owned_to_object)(DLManagedTensorVersioned* tensor,
                           void** object);  // takes the tensor; -1: Python's error is set
    int (*tensor_from_object)(void* object,
                              DLTensor* tensor);  // borrows; -1: Python's error is set
};

inline constexpr int32_t kHostDevice = 1;
inline constexpr int32_t kCudaDevice = 2;
inline constexpr uint8_t kSignedInteger = 0;
inline constexpr uint8_t kUnsignedInteger = 1;
inline constexpr uint8_t kFloat = 2;
inline constexpr uint8_t kBrainFloat = 4;
inline constexpr const char* kUnclaimed = "dltensor";  // the consumer renames what it takes over

}  // namespace moeinf
