#include "transfer/number_check.h"

#include <algorithm>
#include <string>

#include "base/error.h"
#include "layout/palette.h"

// Reads are checked at the speed of a cache, which takes wider registers than every CPU has.
#if defined(__x86_64__) && defined(__GNUC__)
#define MOEINF_WIDE __attribute__((target("avx2")))
#else
#define MOEINF_WIDE
#endif

namespace moeinf {
namespace {

// NaN and infinities have all bits of the exponent set. So a magnitude of at least `least`, taken
// as an unsigned integer, is one of them.
template <class Bits>
struct Rule {
    Bits sign;
    Bits least;
    bool negative;  // is allowed

    [[nodiscard]] bool broken_by(Bits bits) const {
        return static_cast<Bits>(bits & ~sign) >= least || (!negative && bits > sign);
    }
};

// Independent maxima, because one would wait for itself.
template <class Bits>
[[gnu::always_inline]] inline bool broken_anywhere(const Bits* bits, uint64_t count,
                                                   Rule<Bits> rule) {
    constexpr uint64_t kTogether = 128 / sizeof(Bits);
    Bits most[kTogether] = {};  // magnitudes
    Bits last[kTogether] = {};  // with the sign as the highest bit
    const auto magnitude = static_cast<Bits>(~rule.sign);
    uint64_t i = 0;
    for (; rule.negative && i + kTogether <= count; i += kTogether) {
        for (uint64_t j = 0; j < kTogether; ++j) {
            most[j] = std::max(most[j], static_cast<Bits>(bits[i + j] & magnitude));
        }
    }
    for (; i + kTogether <= count; i += kTogether) {
        for (uint64_t j = 0; j < kTogether; ++j) {
            most[j] = std::max(most[j], static_cast<Bits>(bits[i + j] & magnitude));
            last[j] = std::max(last[j], bits[i + j]);
        }
    }
    bool broken = false;
    for (uint64_t j = 0; j < kTogether; ++j) {
        broken = broken || rule.broken_by(most[j]) || rule.broken_by(last[j]);
    }
    for (; i < count; ++i) broken = broken || rule.broken_by(bits[i]);
    return broken;
}

template <class Bits>
bool scan(const Bits* bits, uint64_t count, Rule<Bits> rule) {
    return broken_anywhere(bits, count, rule);
}

template <class Bits>
MOEINF_WIDE bool scan_wide(const Bits* bits, uint64_t count, Rule<Bits> rule) {
    return broken_anywhere(bits, count, rule);
}

bool has_wide() {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx2") != 0;
#else
    return false;
#endif
}

// The index of the first one that breaks the rule, or `count`.
template <class Bits>
uint64_t first_broken(const std::byte* from, uint64_t count, Rule<Bits> rule) {
    typedef Bits Loose __attribute__((may_alias));  // NOLINT(modernize-use-using)
    const auto* bits = reinterpret_cast<const Loose*>(from);
    static const bool kWide = has_wide();
    if (!(kWide ? scan_wide<Bits> : scan<Bits>)(bits, count, rule)) return count;
    uint64_t i = 0;
    while (i < count && !rule.broken_by(bits[i])) ++i;
    return i;
}

// As above: the index of a byte that is no integer from -8 to 7.
uint64_t first_far(const std::byte* from, uint64_t count) {
    unsigned any = 0;
    const auto far = [&](uint64_t i) { return (std::to_integer<unsigned>(from[i]) + 8) & 0xf0; };
    for (uint64_t i = 0; i < count; ++i) any |= far(i);
    if (any == 0) return count;
    uint64_t i = 0;
    while (far(i) == 0) ++i;
    return i;
}

uint64_t first_broken(const NumberCheck& check, const std::byte* from, uint64_t nbytes) {
    if (check.zero_points) return first_far(from, nbytes);
    const bool negative = check.negative;
    switch (check.type) {
        case ScaleType::kF32:
            return first_broken<uint32_t>(from, nbytes / 4, {1u << 31, 0x7f800000, negative});
        case ScaleType::kBF16:
            return first_broken<uint16_t>(from, nbytes / 2, {1u << 15, 0x7f80, negative});
        case ScaleType::kF16:
            return first_broken<uint16_t>(from, nbytes / 2, {1u << 15, 0x7c00, negative});
        case ScaleType::kE4M3:  // has no infinities
            return first_broken<uint8_t>(from, nbytes, {1u << 7, 0x7f, negative});
        case ScaleType::kE8M0:  // has no sign
            return first_broken<uint8_t>(from, nbytes, {0, 0xff, true});
    }
    __builtin_unreachable();
}

// The last byte first where they are one number.
std::string hex(const std::byte* from, uint64_t count, bool one_number = false) {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string text;
    for (uint64_t i = 0; i < count; ++i) {
        const auto byte = std::to_integer<unsigned>(from[one_number ? count - 1 - i : i]);
        text += {kDigits[byte >> 4], kDigits[byte & 15]};
    }
    return text;
}

[[noreturn]] void refuse(const Catalog& catalog, ExpertId expert, const NumberCheck& check,
                         const std::byte* slot, uint64_t slot_offset) {
    static constexpr const char* kNames[] = {"F32", "BF16", "F16", "F8_E8M0", "F8_E4M3"};
    const std::string code =
        hex(slot + slot_offset, static_cast<uint64_t>(scale_bytes(check.type)), true);
    const auto [place, bytes_before] = catalog.origin(expert, slot_offset);
    if (check.zero_points) {
        throw Error(ErrorCode::kRead, place + ": expected zero points from -8 to 7, found I8 0x" +
                                          code + " at byte " + std::to_string(bytes_before));
    }
    throw Error(ErrorCode::kRead, place + ": expected finite numbers" +
                                      (check.negative ? "" : ", none of them negative") +
                                      ", found " + kNames[static_cast<int>(check.type)] + " 0x" +
                                      code + " at byte " + std::to_string(bytes_before));
}

// All rows. The slot is there in full: no such row is checked before (Catalog::cuts_numbers).
void check_palette(const Catalog& catalog, ExpertId expert, const NumberCheck& check,
                   const std::byte* slot) {
    const uint64_t body = check.step - check.tail;
    const int64_t cols = static_cast<int64_t>(body) / kPaletteBytes * kPaletteCols;
    for (uint64_t at = 0; at < check.nbytes; at += check.step) {
        const uint64_t row = check.slot_offset + at;
        const char* wanted = palette_fault(slot + row, cols, static_cast<int64_t>(check.tail));
        if (wanted == nullptr) continue;
        const auto [place, bytes_before] = catalog.origin(expert, row);
        throw Error(ErrorCode::kRead, place + ": expected " + wanted + ", found " +
                                          hex(slot + row + body, check.tail) +
                                          " at the end of the row at byte " +
                                          std::to_string(bytes_before));
    }
}

void check_apart(const Catalog& catalog, ExpertId expert, const NumberCheck& check,
                 const std::byte* slot, uint64_t from, uint64_t to) {
    const auto unit = static_cast<uint64_t>(scale_bytes(check.type));
    const uint64_t skipped = (from - check.slot_offset + check.step - 1) / check.step;
    for (uint64_t at = check.slot_offset + skipped * check.step; at + unit <= to;
         at += check.step) {
        if (first_broken(check, slot + at, unit) == 0) refuse(catalog, expert, check, slot, at);
    }
}

}  // namespace

void check_numbers(const Catalog& catalog, ExpertId expert, const std::byte* slot, uint64_t begin,
                   uint64_t end) {
    for (const NumberCheck& check : catalog.checks()) {
        const uint64_t from = std::max(begin, check.slot_offset);
        const uint64_t to = std::min(end, check.slot_offset + check.nbytes);
        if (from >= to) continue;
        if (check.tail != 0) {
            check_palette(catalog, expert, check, slot);
            continue;
        }
        const auto unit = static_cast<uint64_t>(scale_bytes(check.type));
        if (check.step != unit) {
            check_apart(catalog, expert, check, slot, from, to);
            continue;
        }
        const uint64_t broken = first_broken(check, slot + from, to - from);
        if (broken < (to - from) / unit) refuse(catalog, expert, check, slot, from + broken * unit);
    }
}

}  // namespace moeinf
