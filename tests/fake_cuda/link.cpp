// The links to the devices: one engine per device and direction. Copies queue by urgency, then by
// age. A link has its own clock, so a thread that wakes up late loses no time of the link.
#include <algorithm>
#include <thread>

#include "fake.h"

namespace fake {
namespace {

constexpr size_t kMaxCopies = 65536;
constexpr uint64_t kLastBytes = 4096;

struct Link {
    std::mutex mutex;  // guards all below
    std::condition_variable changed;
    std::set<std::pair<int, uint64_t>> waiting;  // priority, order of arrival
    uint64_t arrivals = 0;
    bool busy = false;
    Time free_at{};
    uint64_t bytes = 0;
    uint64_t busy_ns = 0;
};

struct Log {
    std::mutex mutex;
    std::deque<fake_cuda_copy> copies;
};

Link& link_of(int device, int direction) {
    static Link* const links = new Link[2 * kMaxDevices];
    return links[2 * device + direction];
}

Log& log() {
    static Log* const all = new Log;
    return *all;
}

uint64_t nanoseconds(Time time) {
    return static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count());
}

uint64_t cost_ns(uint64_t nbytes, int direction) {
    const LinkSettings& link = settings().links[direction];
    const double rate = link.bytes_per_second;
    return link.latency_ns +
           (rate > 0 ? static_cast<uint64_t>(static_cast<double>(nbytes) / rate * 1e9) : 0);
}

void sleep_until(Time time) {
    if (Clock::now() < time) std::this_thread::sleep_until(time);
}

void take(Link& link, int priority) {
    std::unique_lock lock(link.mutex);
    const std::pair<int, uint64_t> place{priority, ++link.arrivals};
    link.waiting.insert(place);
    link.changed.wait(lock, [&] { return !link.busy && *link.waiting.begin() == place; });
    link.waiting.erase(place);
    link.busy = true;
}

// Takes the last bytes off the parts.
Part cut_off_the_end(std::vector<Part>& parts) {
    Part& last = parts.back();
    const uint64_t nbytes = std::min(last.nbytes, kLastBytes);
    last.nbytes -= nbytes;
    return {last.source + last.nbytes, last.target + last.nbytes, nbytes};
}

void move(const std::vector<Part>& parts, const Crossing& crossing) {
    if (!copy_bytes(parts, crossing.direction, crossing.device)) {
        break_context(crossing.device, kIllegalAddress,
                      "memory of a copy under way was unmapped or no longer registered");
    }
}

}  // namespace

Time cross_link(const std::vector<Part>& parts, const Crossing& crossing) {
    const auto& [direction, device, priority, enqueued, ready, early] = crossing;
    uint64_t nbytes = 0;
    for (const Part& part : parts) nbytes += part.nbytes;
    Link& link = link_of(device, direction);
    take(link, priority);
    // No other thread touches free_at while the link is busy.
    const Time start = std::max(ready, link.free_at);
    const uint64_t cost = cost_ns(nbytes, direction);
    const Time end = start + std::chrono::nanoseconds(cost);
    // When within its time a copy's bytes appear is nobody's business: all are there at its start,
    // or the last ones only at its end. The others move before that, so that this machine's memory
    // does not add to the link's time.
    std::vector<Part> rest = parts;
    const Part last = early ? Part{} : cut_off_the_end(rest);
    if (!early) sleep_until(start + std::chrono::nanoseconds(cost / 2));
    move(rest, crossing);
    sleep_until(end);
    if (!early) move({last}, crossing);
    {
        const std::lock_guard lock(log().mutex);
        log().copies.push_back({parts[0].source, parts[0].target, nbytes, direction, priority,
                                nanoseconds(enqueued), nanoseconds(start), nanoseconds(end)});
        if (log().copies.size() > kMaxCopies) log().copies.pop_front();
    }
    const std::lock_guard lock(link.mutex);
    link.busy = false;
    link.free_at = end;
    link.bytes += nbytes;
    link.busy_ns += cost;
    link.changed.notify_all();
    return end;
}

void reset_links() {
    for (int device = 0; device < kMaxDevices; ++device) {
        for (const int direction : {FAKE_CUDA_TO_DEVICE, FAKE_CUDA_TO_HOST}) {
            Link& link = link_of(device, direction);
            const std::lock_guard lock(link.mutex);
            link.bytes = 0;
            link.busy_ns = 0;
        }
    }
    const std::lock_guard lock(log().mutex);
    log().copies.clear();
}

}  // namespace fake

using namespace fake;

FAKE_EXPORT uint64_t fake_cuda_device_bytes(int device, int direction) {
    Link& link = link_of(device, direction);
    const std::lock_guard lock(link.mutex);
    return link.bytes;
}

FAKE_EXPORT uint64_t fake_cuda_bytes(int direction) {
    uint64_t sum = 0;
    for (int device = 0; device < kMaxDevices; ++device) {
        sum += fake_cuda_device_bytes(device, direction);
    }
    return sum;
}

FAKE_EXPORT uint64_t fake_cuda_busy_ns(int direction) {
    uint64_t sum = 0;
    for (int device = 0; device < kMaxDevices; ++device) {
        Link& link = link_of(device, direction);
        const std::lock_guard lock(link.mutex);
        sum += link.busy_ns;
    }
    return sum;
}

FAKE_EXPORT uint64_t fake_cuda_copies(fake_cuda_copy* copies, uint64_t most) {
    const std::lock_guard lock(log().mutex);
    const uint64_t count = std::min<uint64_t>(most, log().copies.size());
    std::copy(log().copies.end() - static_cast<std::ptrdiff_t>(count), log().copies.end(), copies);
    return count;
}
