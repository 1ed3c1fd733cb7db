// The file reader for Python: enough to test and measure it without a cache.
#include "transfer/file_reader.h"

#include <pybind11/stl.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/ids.h"
#include "layout/catalog.h"
#include "memory/slot_pool.h"

namespace py = pybind11;

namespace moeinf {
namespace {

// A transfer that Python can wait for. Holds the pool, so that the slot outlives the read.
struct Ticket {
    std::shared_ptr<SlotPool> pool;
    ReadJobPtr transfer;
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
        auto transfer =
            engine_.submit(expert, ticket->pool->slot(slot), priority, [ticket](const ReadJobPtr&) {
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

const char* state_name(ReadState state) {
    switch (state) {
        case ReadState::kQueued:
            return "queued";
        case ReadState::kRunning:
            return "running";
        case ReadState::kDone:
            return "done";
        case ReadState::kFailed:
            return "failed";
        case ReadState::kCancelled:
            return "cancelled";
    }
    return "unknown";
}

}  // namespace

void bind_file_reader(py::module_& module) {
    py::class_<Ticket, std::shared_ptr<Ticket>>(module, "Ticket", "One expert on its way.")
        .def("wait", &Ticket::wait, py::arg("seconds") = py::none(),
             py::call_guard<py::gil_scoped_release>(), "False if it is still on its way.")
        .def_property_readonly(
            "state", [](const Ticket& ticket) { return state_name(ticket.transfer->state()); })
        .def_property_readonly("error",
                               [](const Ticket& ticket) -> std::optional<std::string> {
                                   if (ticket.transfer->state() != ReadState::kFailed)
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

}  // namespace moeinf
