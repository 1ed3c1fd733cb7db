#include "transfer/places.h"

#include <algorithm>
#include <iterator>

namespace moeinf {
namespace {

constexpr double kUsualSecondsPerByte = 1e-9;  // of a place that has not been measured
constexpr double kWeight = 0.25;               // of the latest reading in the average
// A place without work is tried again after this many times the time that a read there takes, so
// that one slow moment does not shut it out. The trials cost at most 2% of the time.
constexpr double kRest = 50;

double elapsed(Places::Clock::time_point from, Places::Clock::time_point to) {
    return std::chrono::duration<double>(to - from).count();
}

}  // namespace

Places::Places(const Catalog& catalog, bool allow_direct, int32_t most_reads)
    : most_reads_(static_cast<size_t>(most_reads)), places_(catalog.num_places()) {
    for (const CatalogFile& file : catalog.files()) {
        std::vector<const SourceFile*>& row = files_.emplace_back(places_.size());
        row[0] = &opened_.emplace_back(file, allow_direct);
        for (const CatalogCopy& copy : file.copies) {
            const CatalogFile there{copy.path, file.nbytes, copy.source};
            row[copy.place] = &opened_.emplace_back(there, allow_direct);
        }
    }
    for (const SourceFile& one : opened_) alignment_ = std::max(alignment_, one.alignment());
}

// Until a read that begins now would end. The oldest read in flight shows a place that hangs: its
// reads do not end, so no average can tell.
double Places::seconds(const Place& place, uint64_t nbytes, Clock::time_point now) const {
    const bool measured = place.seconds_per_byte > 0;
    const double each = measured ? place.seconds_per_byte : kUsualSecondsPerByte;
    const double expected = each * static_cast<double>(place.waiting + nbytes);
    if (!place.readings.empty()) {
        return std::max(expected, elapsed(place.readings.front().began, now));
    }
    return measured && elapsed(place.last_end, now) > kRest * expected ? 0 : expected;
}

std::optional<uint32_t> Places::best(uint32_t file, uint64_t nbytes, uint32_t tried) const {
    const Clock::time_point now = Clock::now();
    std::optional<uint32_t> found;
    bool found_failed = false;
    double least = 0;
    for (uint32_t i = 0; i < count(); ++i) {
        if (files_[file][i] == nullptr || (tried >> i & 1) != 0) continue;
        const bool failed = !places_[i].stats.failure.empty();
        const double takes = seconds(places_[i], nbytes, now);
        if (!found || (failed == found_failed ? takes < least : found_failed)) {
            found = i;
            found_failed = failed;
            least = takes;
        }
    }
    return found;
}

std::optional<uint32_t> Places::choose(uint32_t file, uint64_t nbytes) const {
    if (count() == 1) return 0;  // the reader has no more workers than reads may be in flight
    const std::optional<uint32_t> found = best(file, nbytes, 0);
    return places_[*found].readings.size() < most_reads_ ? found : std::nullopt;
}

std::optional<uint32_t> Places::choose_next(uint32_t file, uint64_t nbytes, uint32_t tried) const {
    return best(file, nbytes, tried);
}

Places::ReadingRef Places::begin(uint32_t place, uint64_t nbytes) {
    Place& at = places_[place];
    at.waiting += nbytes;
    if (spare_.empty()) spare_.emplace_back();
    at.readings.splice(at.readings.end(), spare_, spare_.begin());
    at.readings.back() = {place, nbytes, at.waiting, Clock::now()};
    return std::prev(at.readings.end());
}

void Places::end(ReadingRef reading, const std::string& failure) {
    Place& at = places_[reading->place];
    at.last_end = Clock::now();
    if (failure.empty()) {
        // A place serves all bytes in flight, so the last of them waits for the others.
        const double took = elapsed(reading->began, at.last_end);
        const double each = std::max(took, 1e-9) / static_cast<double>(reading->waiting);
        at.seconds_per_byte = at.seconds_per_byte > 0
                                  ? at.seconds_per_byte + kWeight * (each - at.seconds_per_byte)
                                  : each;
        at.stats.read_bytes += static_cast<int64_t>(reading->nbytes);
    } else if (at.stats.failure.empty()) {
        at.stats.failure = failure;
    }
    at.waiting -= reading->nbytes;
    spare_.splice(spare_.end(), at.readings, reading);
}

std::vector<PlaceStats> Places::stats() const {
    std::vector<PlaceStats> all;
    for (const Place& place : places_) {
        all.push_back(place.stats);
        if (place.seconds_per_byte > 0) all.back().bytes_per_second = 1 / place.seconds_per_byte;
    }
    return all;
}

}  // namespace moeinf
