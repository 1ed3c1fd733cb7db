// The device code of this build: what nvcc made of gather.cu, for every architecture we name.
#pragma once

namespace moeinf::cuda {

// A fat binary for cuModuleLoadData; nullptr where the build had no nvcc.
[[nodiscard]] const void* kernel_image() noexcept;

}  // namespace moeinf::cuda
