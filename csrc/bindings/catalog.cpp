// The catalog for Python: where every expert lies in the files.
#include "layout/catalog.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/find_name.h"
#include "bindings/bindings.h"
#include "bindings/ids.h"

namespace py = pybind11;

namespace moeinf {
namespace {

using Sources = std::map<size_t, std::shared_ptr<ByteSource>>;
using ExtentArray = py::array_t<uint64_t, py::array::c_style | py::array::forcecast>;

using Check = std::tuple<uint64_t, uint64_t, std::optional<ScaleType>, bool, uint64_t>;
using Tensor = std::tuple<uint32_t, uint64_t, std::string>;
using Copy = std::tuple<size_t, uint32_t, std::string, std::optional<std::shared_ptr<ByteSource>>>;
using Recoded = std::tuple<std::string, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t>;

std::vector<Recode> recodes_of(const std::vector<Recoded>& given) {
    static const std::vector<std::string> kKinds = {"signs", "awq", "zeros", "awq_zeros"};
    std::vector<Recode> found;
    for (const auto& [kind, offset, rows, cols, bits, plus] : given) {
        const auto row = static_cast<Recode::Kind>(find_name(kKinds, kind, "recode"));
        found.push_back({row, offset, rows, cols, bits, plus});
    }
    return found;
}

std::shared_ptr<Catalog> make_catalog(int32_t num_layers, int32_t num_experts, uint64_t slot_bytes,
                                      const std::vector<std::pair<std::string, uint64_t>>& files,
                                      const ExtentArray& extents,
                                      const std::vector<std::array<uint64_t, 4>>& transposes,
                                      const std::vector<Check>& checks, std::vector<Tensor> tensors,
                                      const Sources& sources, const std::vector<Recoded>& recodes,
                                      const std::vector<Copy>& copies,
                                      const std::vector<std::array<uint64_t, 4>>& palettes) {
    if (extents.ndim() != 3 || extents.shape(2) != 4 ||
        extents.shape(0) != static_cast<py::ssize_t>(num_layers) * num_experts) {
        std::string found = "[";
        for (py::ssize_t i = 0; i < extents.ndim(); ++i) {
            if (i > 0) found += ", ";
            found += std::to_string(extents.shape(i));
        }
        throw Error(ErrorCode::kInvalid,
                    "expected extents of shape [" +
                        std::to_string(static_cast<int64_t>(num_layers) * num_experts) +
                        ", extents per expert, 4], found " + found + "]");
    }
    std::vector<CatalogFile> catalog_files;
    for (const auto& [path, nbytes] : files) catalog_files.push_back({path, nbytes});
    for (const auto& [file, source] : sources) catalog_files.at(file).source = source;
    for (const auto& [file, place, path, source] : copies) {
        catalog_files.at(file).copies.push_back({place, path, source.value_or(nullptr)});
    }

    std::vector<Transpose> turned;
    for (const auto& [offset, rows, cols, element] : transposes) {
        turned.push_back({offset, rows, cols, element});
    }

    std::vector<NumberCheck> numbers;
    for (const auto& [offset, nbytes, type, negative, step] : checks) {
        numbers.push_back({offset, nbytes, type.value_or(ScaleType::kE4M3), negative, step, 0,
                           !type.has_value()});
    }
    for (const auto& [offset, nbytes, row, tail] : palettes) {
        numbers.push_back({offset, nbytes, {}, true, row, tail});
    }
    std::vector<CatalogTensor> named;
    named.reserve(tensors.size());
    for (auto& [file, offset, name] : tensors) named.push_back({file, offset, std::move(name)});

    const auto values = extents.unchecked<3>();
    std::vector<Extent> flat;
    flat.reserve(static_cast<size_t>(extents.shape(0) * extents.shape(1)));
    for (py::ssize_t expert = 0; expert < extents.shape(0); ++expert) {
        for (py::ssize_t i = 0; i < extents.shape(1); ++i) {
            const uint64_t file = values(expert, i, 0);
            if (file >= files.size()) {
                throw Error(ErrorCode::kInvalid,
                            "expert " + std::to_string(expert) + ", extent " + std::to_string(i) +
                                ": expected a file index below " + std::to_string(files.size()) +
                                ", found " + std::to_string(file));
            }
            flat.push_back({static_cast<uint32_t>(file), values(expert, i, 1), values(expert, i, 2),
                            values(expert, i, 3)});
        }
    }
    return std::make_shared<Catalog>(ModelShape{num_layers, num_experts}, slot_bytes,
                                     std::move(catalog_files), std::move(flat), std::move(turned),
                                     std::move(numbers), std::move(named), recodes_of(recodes));
}

py::array_t<uint64_t> extents_of(const Catalog& catalog, ExpertId expert) {
    const std::span<const Extent> extents = catalog.extents(expert);
    py::array_t<uint64_t> result({static_cast<py::ssize_t>(extents.size()), py::ssize_t{4}});
    auto values = result.mutable_unchecked<2>();
    for (py::ssize_t i = 0; i < result.shape(0); ++i) {
        const Extent& extent = extents[static_cast<size_t>(i)];
        values(i, 0) = extent.file;
        values(i, 1) = extent.file_offset;
        values(i, 2) = extent.nbytes;
        values(i, 3) = extent.slot_offset;
    }
    return result;
}

}  // namespace

void bind_catalog(py::module_& module) {
    py::class_<Catalog, std::shared_ptr<Catalog>>(
        module, "Catalog",
        "Which ranges of which files make up every expert, and where in a slot each goes.")
        .def(py::init(&make_catalog), py::arg("num_layers"), py::arg("num_experts"),
             py::arg("slot_bytes"), py::arg("files"), py::arg("extents"),
             py::arg("transposes") = std::vector<std::array<uint64_t, 4>>{},
             py::arg("checks") = std::vector<Check>{}, py::arg("tensors") = std::vector<Tensor>{},
             py::arg("sources") = Sources{}, py::arg("recodes") = std::vector<Recoded>{},
             py::arg("copies") = std::vector<Copy>{},
             py::arg("palettes") = std::vector<std::array<uint64_t, 4>>{},
             "files: list of (path, bytes). extents: uint64 [experts, extents per expert, 4] as "
             "(file, file offset, bytes, slot offset), experts by layer * num_experts + expert. "
             "transposes: (slot offset, rows, columns, bytes of an element), as they are read; in "
             "the slot they lie as columns x rows. checks: (slot offset, bytes, type, negative, "
             "step) of "
             "numbers that may not be NaN or infinite, and below zero only if negative; with None "
             "as the type, "
             "bytes from -8 to 7. tensors: "
             "(file, file offset, name), for messages. sources: by index of `files`, of those that "
             "are none. recodes: (kind, slot offset, rows, columns, bits, plus) of integers that "
             "are "
             "written again in the slot. copies: (index of `files`, place from 1, path, source or "
             "None) of the same bytes elsewhere. palettes: (slot offset, bytes, bytes of a row, "
             "bytes of its tail) of rows of bf16 in 12 bits.")
        .def_property_readonly("num_layers", &Catalog::num_layers)
        .def_property_readonly("num_experts", &Catalog::num_experts)
        .def_property_readonly("slot_bytes", &Catalog::slot_bytes)
        .def_property_readonly("expert_bytes", &Catalog::expert_bytes)
        .def_property_readonly("files",
                               [](const Catalog& catalog) {
                                   std::vector<std::pair<std::string, uint64_t>> files;
                                   for (const CatalogFile& file : catalog.files()) {
                                       files.emplace_back(file.path, file.nbytes);
                                   }
                                   return files;
                               })
        .def("extents", &extents_of, py::arg("expert"),
             "uint64 [extents, 4] of one flat expert id, as given to the constructor.");
}

}  // namespace moeinf
