// What an expert computes, from the words of C.
#include <limits>
#include <optional>
#include <string>

#include "base/find_name.h"
#include "capi/border.h"
#include "capi/objects.h"
#include "cpu_kernels/formats/formats.h"

namespace moeinf::capi {
namespace {

const std::vector<std::string> kDTypes = {"bf16", "f16", "f32"};

Matrix read_matrix(const moeinf_matrix* pointer, const char* name) {
    const moeinf_matrix given = read_struct(pointer, name);
    check_given(given.format, "the format of a matrix");
    Matrix matrix{.format = find_format(given.format),
                  .rows = given.rows,
                  .cols = given.cols,
                  .values = {given.values_offset, given.values_stride}};
    if (given.scale_type != nullptr) {
        Scales scales{.rows = {given.scales_offset, given.scales_stride},
                      .type = scale_type_of(given.scale_type),
                      .block_rows = given.scale_rows,
                      .block_cols = given.scale_cols};
        if (given.has_zeros != 0) scales.zeros = Rows{given.zeros_offset, given.zeros_stride};
        matrix.scales = scales;
    }
    if (given.has_multiplier != 0) matrix.multiplier = given.multiplier_offset;
    if (given.bias_dtype != nullptr) {
        matrix.bias = Rows{given.bias_offset, given.bias_stride};
        matrix.bias_dtype = static_cast<DType>(find_name(kDTypes, given.bias_dtype, "dtype"));
    }
    return matrix;
}

}  // namespace

ScaleType scale_type_of(const std::string& name) {
    static const std::vector<std::string> kNames = {"f32", "bf16", "f16", "e8m0", "e4m3"};
    return static_cast<ScaleType>(find_name(kNames, name, "type of scales"));
}

ExpertFfn read_expert(const moeinf_expert& expert) {
    const moeinf_expert given = read_struct(&expert, "moeinf_expert");
    const auto limit =
        given.limit == 0 ? std::numeric_limits<float>::infinity() : static_cast<float>(given.limit);
    const Gate function =
        find_gate(text_or(given.function, "glu"), text_or(given.activation, "silu"),
                  given.alpha == 0 ? 1.0f : static_cast<float>(given.alpha), limit);
    std::optional<Matrix> up;
    if (given.up != nullptr) up = read_matrix(given.up, "up");
    return {read_matrix(given.gate, "gate"), up, read_matrix(given.down, "down"), function};
}

}  // namespace moeinf::capi
