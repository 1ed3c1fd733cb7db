// The device code of this build: gather.cu, compiled by nvcc for every architecture in
// CMakeLists.txt.
#pragma once

namespace moeinf::cuda {

// A fat binary for cuModuleLoadData; nullptr where the build had no nvcc.
[[nodiscard]] const void* kernel_image() noexcept;

}  // namespace moeinf::cuda
