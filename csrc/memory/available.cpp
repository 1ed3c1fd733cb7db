#include "memory/available.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <string>

namespace moeinf {
namespace {

constexpr uint64_t kUnknown = std::numeric_limits<uint64_t>::max();

// The number after `key` in a file of "key number" lines.
std::optional<uint64_t> field(const std::string& path, const std::string& key) {
    std::ifstream file(path);
    std::string line;
    while (std::getline(file, line)) {
        if (line.compare(0, key.size(), key) == 0 && line.size() > key.size() &&
            (line[key.size()] == ' ' || line[key.size()] == '\t')) {
            return std::stoull(line.substr(key.size()));
        }
    }
    return std::nullopt;
}

// The number in a file; none if the file is missing or says "max".
std::optional<uint64_t> whole(const std::string& path) {
    std::ifstream file(path);
    uint64_t value = 0;
    if (!(file >> value)) return std::nullopt;
    return value;
}

uint64_t available_in_group(const std::string& folder) {
    const auto limit = whole(folder + "/memory.max");
    const auto used = whole(folder + "/memory.current");
    if (!limit || !used) return kUnknown;
    // The group counts cached pages of files as used. The kernel drops them when memory is short.
    const uint64_t cache = field(folder + "/memory.stat", "inactive_file").value_or(0) +
                           field(folder + "/memory.stat", "active_file").value_or(0);
    const uint64_t held = *used > cache ? *used - cache : 0;
    return *limit > held ? *limit - held : 0;
}

// The smallest limit of all groups from this process's group up to the root.
uint64_t available_in_groups() {
    std::ifstream membership("/proc/self/cgroup");
    std::string line;
    uint64_t least = kUnknown;
    while (std::getline(membership, line)) {
        if (line.compare(0, 3, "0::") != 0) continue;
        std::string group = line.substr(3);
        for (size_t end = group.size(); end != std::string::npos; end = group.rfind('/')) {
            group.resize(end);
            least = std::min(least, available_in_group("/sys/fs/cgroup" + group));
        }
    }
    return least;
}

}  // namespace

uint64_t available_memory() {
    const auto ram = field("/proc/meminfo", "MemAvailable:");
    if (!ram) return available_in_groups();
    const uint64_t swap = field("/proc/meminfo", "SwapFree:").value_or(0);
    return std::min((*ram + swap) * 1024, available_in_groups());
}

}  // namespace moeinf
