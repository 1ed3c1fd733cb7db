// Sources of experts for Python: memory that Python keeps alive, and a function of Python.
#include "layout/byte_source.h"

#include <pybind11/pybind11.h>

#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "base/error.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace moeinf {
namespace {

// Worker threads may end after Python has. Nothing of Python may be touched then.
bool python_is_ending() noexcept {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
}

// An object of Python that any thread may let go, with or without the GIL.
class Kept {
public:
    explicit Kept(py::object object) : object_(std::move(object)) {}
    Kept(const Kept&) = delete;
    Kept& operator=(const Kept&) = delete;
    ~Kept() {
        if (python_is_ending()) {
            (void)object_.release();
            return;
        }
        const py::gil_scoped_acquire gil;
        object_ = py::object();
    }

    [[nodiscard]] const py::object& get() const noexcept { return object_; }

private:
    py::object object_;
};

class HeldMemory final : public ByteSource {
public:
    HeldMemory(uintptr_t address, uint64_t nbytes, py::object owner)
        : bytes_(reinterpret_cast<const std::byte*>(address), nbytes), owner_(std::move(owner)) {}

    void read(uint64_t offset, std::span<std::byte> out) const override {
        if (offset > bytes_.size() || out.size() > bytes_.size() - offset) {
            throw Error(ErrorCode::kRead, "expected " + std::to_string(out.size()) +
                                              " bytes at offset " + std::to_string(offset) +
                                              ", found " + std::to_string(bytes_.size()) +
                                              " in all");
        }
        std::memcpy(out.data(), bytes_.data() + offset, out.size());
    }

private:
    const std::span<const std::byte> bytes_;
    const Kept owner_;
};

class Callback final : public ByteSource {
public:
    explicit Callback(py::object function) : function_(std::move(function)) {}

    void read(uint64_t offset, std::span<std::byte> out) const override {
        const Counted counted(*this);
        const py::gil_scoped_acquire gil;
        try {
            call(offset, out);
        } catch (const py::error_already_set& error) {
            throw Error(ErrorCode::kRead, py::str(error.value()).cast<std::string>());
        } catch (const py::cast_error&) {
            throw Error(ErrorCode::kRead, "expected the number of bytes that were written");
        }
    }

    [[nodiscard]] bool whole_segments() const noexcept override { return true; }

    // No call begins after this; waits for those that have begun. A thread that waits for the
    // interpreter while that ends would be killed.
    void close() {
        std::unique_lock guard(lock_);
        closed_ = true;
        none_left_.wait(guard, [this] { return calls_ == 0; });
    }

private:
    class Counted {
    public:
        explicit Counted(const Callback& of) : of_(of) {
            const std::lock_guard guard(of_.lock_);
            if (of_.closed_) throw Error(ErrorCode::kRead, "the program is ending");
            ++of_.calls_;
        }
        Counted(const Counted&) = delete;
        Counted& operator=(const Counted&) = delete;
        ~Counted() {
            const std::lock_guard guard(of_.lock_);
            if (--of_.calls_ == 0) of_.none_left_.notify_all();
        }

    private:
        const Callback& of_;
    };

    // The view ends with the call, so that a function that keeps it is told so.
    void call(uint64_t offset, std::span<std::byte> out) const {
        const py::memoryview view =
            py::memoryview::from_memory(out.data(), static_cast<py::ssize_t>(out.size()));
        const py::object result = function_.get()(offset, view);
        view.attr("release")();
        const auto written = result.cast<uint64_t>();
        if (written != out.size()) {
            throw Error(ErrorCode::kRead, "expected " + std::to_string(out.size()) + " bytes, " +
                                              std::to_string(written) + " were written");
        }
    }

    const Kept function_;
    mutable std::mutex lock_;  // guards the next two
    mutable int64_t calls_ = 0;
    bool closed_ = false;
    mutable std::condition_variable none_left_;
};

}  // namespace

void bind_byte_source(py::module_& module) {
    py::class_<ByteSource, std::shared_ptr<ByteSource>>(module, "ByteSource",
                                                        "Bytes of experts that lie in no file.",
                                                        py::release_gil_before_calling_cpp_dtor())
        .def_static(
            "memory",
            [](uintptr_t address, uint64_t nbytes, py::object owner) {
                return std::shared_ptr<ByteSource>(
                    std::make_shared<HeldMemory>(address, nbytes, std::move(owner)));
            },
            py::arg("address"), py::arg("nbytes"), py::arg("owner"),
            "The bytes at an address, valid while `owner` lives.")
        .def_static(
            "callback",
            [](py::object function) {
                return std::shared_ptr<ByteSource>(std::make_shared<Callback>(std::move(function)));
            },
            py::arg("function"),
            "function(offset, destination) writes all of the memoryview and returns its length.")
        .def(
            "close",
            [](ByteSource& self) {
                if (auto* const callback = dynamic_cast<Callback*>(&self)) callback->close();
            },
            py::call_guard<py::gil_scoped_release>(),
            "Of a callback: no call begins after this, and none is under way.")
        .def(
            "read",
            [](const ByteSource& self, uint64_t offset, const py::buffer& out) {
                const py::buffer_info info = out.request(true);
                const std::span<std::byte> bytes{static_cast<std::byte*>(info.ptr),
                                                 static_cast<size_t>(info.size * info.itemsize)};
                const py::gil_scoped_release released;
                self.read(offset, bytes);
            },
            py::arg("offset"), py::arg("out"));
}

}  // namespace moeinf
