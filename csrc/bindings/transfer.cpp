// Catalog, slot pool and file reader for Python: enough to test and measure them without a cache.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/ids.h"
#include "layout/catalog.h"
#include "memory/arena.h"
#include "memory/slot_pool.h"
#include "probe/file_read.h"
#include "transfer/file_reader.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace moeinf {
namespace {

using ExtentArray = py::array_t<uint64_t, py::array::c_style | py::array::forcecast>;

std::shared_ptr<Catalog> make_catalog(int32_t num_layers, int32_t num_experts, uint64_t slot_bytes,
                                      const std::vector<std::pair<std::string, uint64_t>>& files,
                                      const ExtentArray& extents) {
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
                                     std::move(catalog_files), std::move(flat));
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

// A transfer that Python can wait for. Holds the pool, so that the slot outlives the read.
struct Ticket {
    std::shared_ptr<SlotPool> pool;
    TransferPtr transfer;
    std::mutex lock;  // guards finished_at and finished
    std::condition_variable changed;
    std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();
    std::chrono::steady_clock::time_point finished_at;
    bool finished = false;

    bool wait(std::optional<double> seconds) {
        std::unique_lock guard(lock);
        const auto is_finished = [this] { return finished; };
        if (!seconds) {
            changed.wait(guard, is_finished);
        } else {
            (void)changed.wait_for(guard, std::chrono::duration<double>(*seconds), is_finished);
        }
        return finished;
    }
};

class PythonEngine {
public:
    PythonEngine(std::shared_ptr<const Catalog> catalog, FileReaderOptions options)
        : catalog_(catalog), engine_(std::move(catalog), options) {}

    std::shared_ptr<Ticket> submit(ExpertId expert, std::shared_ptr<SlotPool> pool, SlotId slot,
                                   Priority priority) {
        if (!is_some(slot) || number(slot) >= pool->slots()) {
            throw Error(ErrorCode::kInvalid, "expected a slot below " +
                                                 std::to_string(pool->slots()) + ", found " +
                                                 std::to_string(number(slot)));
        }
        if (pool->slot_bytes() < catalog_->slot_bytes()) {
            throw Error(ErrorCode::kInvalid,
                        "expected slots of at least " + std::to_string(catalog_->slot_bytes()) +
                            " bytes, found " + std::to_string(pool->slot_bytes()));
        }
        auto ticket = std::make_shared<Ticket>();
        ticket->pool = std::move(pool);
        auto transfer = engine_.submit(expert, ticket->pool->slot(slot), priority,
                                       [ticket](const TransferPtr&) {
                                           const std::lock_guard guard(ticket->lock);
                                           ticket->finished = true;
                                           ticket->finished_at = std::chrono::steady_clock::now();
                                           ticket->changed.notify_all();
                                       });
        ticket->transfer = std::move(transfer);
        return ticket;
    }

    FileReader& engine() noexcept { return engine_; }

private:
    std::shared_ptr<const Catalog> catalog_;
    FileReader engine_;
};

const char* state_name(TransferState state) {
    switch (state) {
        case TransferState::kQueued:
            return "queued";
        case TransferState::kRunning:
            return "running";
        case TransferState::kDone:
            return "done";
        case TransferState::kFailed:
            return "failed";
        case TransferState::kCancelled:
            return "cancelled";
    }
    return "unknown";
}

std::shared_ptr<SlotPool> make_pool(uint64_t slot_bytes, int32_t slots,
                                    std::optional<int32_t> capacity) {
    const int32_t most = capacity.value_or(slots);
    if (most <= 0 || slot_bytes == 0 || slot_bytes > UINT64_MAX / static_cast<uint64_t>(most)) {
        throw Error(ErrorCode::kInvalid, "expected at least one slot of at least one byte, found " +
                                             std::to_string(most) + " of " +
                                             std::to_string(slot_bytes));
    }
    return std::make_shared<SlotPool>(make_host_arena(slot_bytes * static_cast<uint64_t>(most)),
                                      slot_bytes, most, slots);
}

void bind_catalog(py::module_& module) {
    py::class_<Catalog, std::shared_ptr<Catalog>>(
        module, "Catalog",
        "Which ranges of which files make up every expert, and where in a slot each goes.")
        .def(py::init(&make_catalog), py::arg("num_layers"), py::arg("num_experts"),
             py::arg("slot_bytes"), py::arg("files"), py::arg("extents"),
             "files: list of (path, bytes). extents: uint64 [experts, extents per expert, 4] as "
             "(file, file offset, bytes, slot offset), experts by layer * num_experts + expert.")
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

void bind_pool(py::module_& module) {
    py::class_<SlotPool, std::shared_ptr<SlotPool>>(
        module, "SlotPool", "Equal slots in one range of RAM; their address never changes.")
        .def(py::init(&make_pool), py::arg("slot_bytes"), py::arg("slots"), py::kw_only(),
             py::arg("capacity") = py::none())
        .def_property_readonly("slot_bytes", &SlotPool::slot_bytes)
        .def_property_readonly("slots", &SlotPool::slots)
        .def_property_readonly("capacity", &SlotPool::capacity)
        .def("resize", &SlotPool::resize, py::arg("slots"),
             py::call_guard<py::gil_scoped_release>())
        .def(
            "numpy",
            [](const std::shared_ptr<SlotPool>& pool, SlotId slot) {
                if (!is_some(slot) || number(slot) >= pool->slots()) {
                    throw py::index_error("slot " + std::to_string(number(slot)) + " of " +
                                          std::to_string(pool->slots()));
                }
                return py::array_t<uint8_t>({static_cast<py::ssize_t>(pool->slot_bytes())}, {1},
                                            reinterpret_cast<uint8_t*>(pool->slot(slot)),
                                            py::cast(pool));
            },
            py::arg("slot"), "The bytes of one slot, uint8 [slot_bytes], not copied.");
}

void bind_engine(py::module_& module) {
    py::class_<Ticket, std::shared_ptr<Ticket>>(module, "Ticket", "One expert on its way.")
        .def("wait", &Ticket::wait, py::arg("seconds") = py::none(),
             py::call_guard<py::gil_scoped_release>(), "False if it is still on its way.")
        .def_property_readonly(
            "state", [](const Ticket& ticket) { return state_name(ticket.transfer->state()); })
        .def_property_readonly("error",
                               [](const Ticket& ticket) -> std::optional<std::string> {
                                   if (ticket.transfer->state() != TransferState::kFailed)
                                       return std::nullopt;
                                   return ticket.transfer->error();
                               })
        .def_property_readonly("seconds", [](Ticket& ticket) -> std::optional<double> {
            const std::lock_guard guard(ticket.lock);
            if (!ticket.finished) return std::nullopt;
            return std::chrono::duration<double>(ticket.finished_at - ticket.started).count();
        });

    py::class_<PythonEngine, std::shared_ptr<PythonEngine>>(
        module, "FileReader", "Reads experts from files into slots on worker threads.")
        .def(py::init([](std::shared_ptr<Catalog> catalog, int32_t threads, size_t chunk_bytes,
                         bool direct) {
                 return std::make_shared<PythonEngine>(
                     std::move(catalog), FileReaderOptions{threads, chunk_bytes, direct});
             }),
             py::arg("catalog"), py::kw_only(), py::arg("threads") = 0, py::arg("chunk_bytes") = 0,
             py::arg("direct") = true, py::call_guard<py::gil_scoped_release>())
        .def(
            "submit",
            [](PythonEngine& self, ExpertId expert, std::shared_ptr<SlotPool> pool, SlotId slot,
               bool prefetch) {
                return self.submit(expert, std::move(pool), slot,
                                   prefetch ? Priority::kPrefetch : Priority::kDemand);
            },
            py::arg("expert"), py::arg("pool"), py::arg("slot"), py::kw_only(),
            py::arg("prefetch") = false, py::call_guard<py::gil_scoped_release>())
        .def(
            "promote",
            [](PythonEngine& self, const Ticket& ticket) {
                self.engine().promote(ticket.transfer);
            },
            py::arg("ticket"), py::call_guard<py::gil_scoped_release>())
        .def(
            "file_is_direct",
            [](PythonEngine& self, uint32_t file) { return self.engine().file_is_direct(file); },
            py::arg("file"))
        .def_property_readonly("threads",
                               [](PythonEngine& self) { return self.engine().options().threads; })
        .def_property_readonly(
            "chunk_bytes", [](PythonEngine& self) { return self.engine().options().chunk_bytes; });
}

}  // namespace

void bind_transfer(py::module_& module) {
    bind_catalog(module);
    bind_pool(module);
    bind_engine(module);
    module.def(
        "read_bandwidth",
        [](const std::string& path, double seconds) {
            ReadBandwidth found;
            {
                const py::gil_scoped_release released;
                found = read_bandwidth(path, seconds);
            }
            py::list ways;
            for (const ReadWay& way : found.ways) {
                ways.append(py::dict("request_bytes"_a = way.request_bytes,
                                     "in_flight"_a = way.in_flight,
                                     "bytes_per_second"_a = way.bytes_per_second));
            }
            return py::dict("path"_a = found.path, "direct"_a = found.direct,
                            "bytes_per_second"_a = found.ways.front().bytes_per_second,
                            "ways"_a = ways);
        },
        py::arg("path"), py::arg("seconds") = 1.0,
        "Sequential read rates of a file, or of a folder's largest file: path, direct, "
        "bytes_per_second (the best) and ways (request_bytes, in_flight, bytes_per_second each).");
}

}  // namespace moeinf
