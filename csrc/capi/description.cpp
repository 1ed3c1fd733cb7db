#include "capi/description.h"

#include <sys/stat.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <list>
#include <optional>
#include <string_view>
#include <utility>

#include "base/find_name.h"
#include "capi/border.h"

namespace moeinf::capi {
namespace {

// Bytes that the description itself holds.
class Held final : public ByteSource {
public:
    explicit Held(std::vector<std::byte> bytes) : bytes_(std::move(bytes)) {}
    void read(uint64_t offset, std::span<std::byte> out) const override {
        std::memcpy(out.data(), bytes_.data() + offset, out.size());
    }

private:
    const std::vector<std::byte> bytes_;
};

const std::vector<std::string> kRecodes = {"signs", "awq", "zeros", "awq_zeros"};

class Reader {
public:
    explicit Reader(std::string path) : path_(std::move(path)), file_(path_) {}

    Store read() {
        if (!file_) fail(std::string("cannot be opened: ") + strerror(errno));
        if (!next() || line_ != "moeinf experts 1") {
            fail("expected a description that begins with \"moeinf experts 1\"");
        }
        while (next() && line_ != "end") read_line();
        if (line_ != "end") fail("the file ends too early");
        if (function_.empty() || matrices_.size() < 2) fail("expected a function and its matrices");
        Store store;
        store.catalog = std::make_shared<const Catalog>(
            shape_, slot_bytes_, std::move(files_), std::move(extents_), std::move(transposes_),
            std::move(checks_), std::vector<CatalogTensor>(), std::move(recodes_));
        store.expert = read_expert(expert());
        return store;
    }

private:
    [[noreturn]] void fail(const std::string& what) const {
        const std::string where = number_ == 0 ? "" : ": line " + std::to_string(number_);
        throw Error(ErrorCode::kRead, path_ + where + ": " + what);
    }

    bool next() {
        ++number_;
        return static_cast<bool>(std::getline(file_, line_));
    }

    std::string word() {
        const size_t end = std::min(rest_.find(' '), rest_.size());
        std::string found(rest_.substr(0, end));
        rest_.remove_prefix(std::min(end + 1, rest_.size()));
        if (found.empty()) fail("expected another word in \"" + line_ + "\"");
        return found;
    }

    template <class Number>
    Number number() {
        const std::string found = word();
        Number value{};
        const auto [end, error] = std::from_chars(found.data(), found.data() + found.size(), value);
        if (error != std::errc() || end != found.data() + found.size()) {
            fail("expected a number, found \"" + found + "\"");
        }
        return value;
    }

    // Lives as long as the reader.
    const char* kept_word() { return words_.emplace_back(word()).c_str(); }

    moeinf_matrix& matrix() {
        if (matrices_.empty()) fail("expected a matrix before \"" + line_ + "\"");
        return matrices_.back().second;
    }

    void read_line() {
        rest_ = line_;
        const std::string kind = word();
        if (kind == "extent") {
            const auto file = number<uint32_t>();
            const auto offset = number<uint64_t>();
            const auto nbytes = number<uint64_t>();
            extents_.push_back({file, offset, nbytes, number<uint64_t>()});
        } else if (kind == "shape") {
            shape_.num_layers = number<int32_t>();
            shape_.num_experts = number<int32_t>();
            slot_bytes_ = number<uint64_t>();
        } else if (kind == "function") {
            function_ = word();
            activation_ = word();
            alpha_ = number<double>();
            limit_ = number<double>();
        } else if (kind == "file") {
            read_file();
        } else if (kind == "held") {
            read_held();
        } else if (kind == "transpose") {
            const auto offset = number<uint64_t>();
            const auto rows = number<uint64_t>();
            const auto cols = number<uint64_t>();
            transposes_.push_back({offset, rows, cols, number<uint64_t>()});
        } else if (kind == "check") {
            const auto offset = number<uint64_t>();
            const auto nbytes = number<uint64_t>();
            const auto type = scale_type_of(word());
            const bool negative = number<int32_t>() != 0;
            checks_.push_back({offset, nbytes, type, negative, number<uint64_t>()});
        } else if (kind == "palette") {
            const auto offset = number<uint64_t>();
            const auto nbytes = number<uint64_t>();
            const auto row = number<uint64_t>();
            checks_.push_back({offset, nbytes, {}, true, row, number<uint64_t>()});
        } else if (kind == "zero_points") {
            const auto offset = number<uint64_t>();
            checks_.push_back({offset, number<uint64_t>(), ScaleType::kE4M3, true, 1, 0, true});
        } else if (kind == "recode") {
            const auto row = static_cast<Recode::Kind>(find_name(kRecodes, word(), "recode"));
            const auto offset = number<uint64_t>();
            const auto rows = number<uint64_t>();
            const auto cols = number<uint64_t>();
            const auto bits = number<uint64_t>();
            recodes_.push_back({row, offset, rows, cols, bits, number<uint64_t>()});
        } else {
            read_matrix_line(kind);
        }
    }

    void read_matrix_line(const std::string& kind) {
        if (kind == "matrix") {
            auto& [name, one] = matrices_.emplace_back(word(), moeinf_matrix{});
            MOEINF_INIT(one);
            one.format = kept_word();
            one.rows = number<int64_t>();
            one.cols = number<int64_t>();
            one.values_offset = number<uint64_t>();
            one.values_stride = number<int64_t>();
        } else if (kind == "scales") {
            moeinf_matrix& one = matrix();
            one.scale_type = kept_word();
            one.scales_offset = number<uint64_t>();
            one.scales_stride = number<int64_t>();
            one.scale_rows = number<int64_t>();
            one.scale_cols = number<int64_t>();
        } else if (kind == "zeros") {
            moeinf_matrix& one = matrix();
            one.has_zeros = 1;
            one.zeros_offset = number<uint64_t>();
            one.zeros_stride = number<int64_t>();
        } else if (kind == "multiplier") {
            moeinf_matrix& one = matrix();
            one.has_multiplier = 1;
            one.multiplier_offset = number<uint64_t>();
        } else if (kind == "bias") {
            moeinf_matrix& one = matrix();
            one.bias_dtype = kept_word();
            one.bias_offset = number<uint64_t>();
            one.bias_stride = number<int64_t>();
        } else {
            fail("no line begins with \"" + kind + "\": it was written by another version");
        }
    }

    void read_file() {
        const auto nbytes = number<uint64_t>();
        const auto modified = number<int64_t>();
        const std::string path(rest_);
        struct stat status{};
        if (stat(path.c_str(), &status) != 0) {
            fail(path + ": cannot be examined: " + strerror(errno));
        }
        const int64_t found = int64_t{status.st_mtim.tv_sec} * 1'000'000'000 +
                              static_cast<int64_t>(status.st_mtim.tv_nsec);
        if (static_cast<uint64_t>(status.st_size) != nbytes || found != modified) {
            fail(path + ": was changed after the description was written: describe it again");
        }
        files_.push_back({path, nbytes});
    }

    void read_held() {
        const std::string hex = word();
        if (hex.size() % 2 != 0) fail("expected an even number of hexadecimal digits");
        std::vector<std::byte> bytes;
        for (size_t at = 0; at < hex.size(); at += 2) {
            unsigned value = 0;
            const char* const end = hex.data() + at + 2;
            if (std::from_chars(hex.data() + at, end, value, 16).ptr != end) {
                fail("expected hexadecimal digits");
            }
            bytes.push_back(static_cast<std::byte>(value));
        }
        const uint64_t nbytes = bytes.size();
        files_.push_back(
            {std::string(rest_), nbytes, std::make_shared<const Held>(std::move(bytes))});
    }

    moeinf_expert expert() const {
        moeinf_expert found;
        MOEINF_INIT(found);
        found.function = function_.c_str();
        found.activation = activation_.c_str();
        found.alpha = alpha_;
        found.limit = limit_;
        for (const auto& [name, one] : matrices_) {
            (name == "gate" ? found.gate : name == "up" ? found.up : found.down) = &one;
        }
        return found;
    }

    const std::string path_;
    std::ifstream file_;
    std::string line_;
    std::string_view rest_;
    int64_t number_ = 0;
    ModelShape shape_;
    uint64_t slot_bytes_ = 0;
    std::string function_, activation_;
    double alpha_ = 0, limit_ = 0;
    std::list<std::pair<std::string, moeinf_matrix>> matrices_;
    std::list<std::string> words_;
    std::vector<CatalogFile> files_;
    std::vector<Extent> extents_;
    std::vector<Transpose> transposes_;
    std::vector<NumberCheck> checks_;
    std::vector<Recode> recodes_;
};

}  // namespace

Store read_description(const std::string& path) {
    return Reader(path).read();
}

}  // namespace moeinf::capi
