#include "memory/available.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <optional>
#include <string>
#include <vector>

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
            return std::strtoull(line.c_str() + key.size(), nullptr, 10);
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

// The names that one version of control groups gives to its files.
struct GroupFiles {
    std::vector<std::string> limits;
    std::string used;
    std::vector<std::string> file_pages;  // keys of memory.stat
};

const GroupFiles kVersion2{
    {"memory.max", "memory.high"}, "memory.current", {"inactive_file", "active_file"}};
const GroupFiles kVersion1{{"memory.limit_in_bytes"},
                           "memory.usage_in_bytes",
                           {"total_inactive_file", "total_active_file"}};

uint64_t available_in_group(const std::string& folder, const GroupFiles& files) {
    uint64_t limit = kUnknown;
    for (const std::string& name : files.limits) {
        limit = std::min(limit, whole(folder + "/" + name).value_or(kUnknown));
    }
    const auto used = whole(folder + "/" + files.used);
    if (limit == kUnknown || !used) return kUnknown;
    // The group counts cached pages of files as used. The kernel drops them when memory is short.
    uint64_t cache = 0;
    for (const std::string& key : files.file_pages) {
        cache += field(folder + "/memory.stat", key).value_or(0);
    }
    const uint64_t held = *used > cache ? *used - cache : 0;
    return limit > held ? limit - held : 0;
}

// The least of `group` and of all groups above it, up to the root.
uint64_t available_up_to_root(const std::string& root, std::string group, const GroupFiles& files) {
    uint64_t least = kUnknown;
    for (size_t end = group.size(); end != std::string::npos; end = group.rfind('/')) {
        group.resize(end);
        least = std::min(least, available_in_group(root + group, files));
    }
    return least;
}

// A container may see its own group as the root, so the root is asked in any case.
uint64_t available_in_groups(const std::string& proc, const std::string& cgroups) {
    std::string version2;
    std::string version1;
    std::ifstream membership(proc + "/self/cgroup");
    std::string line;  // number:controllers:group
    while (std::getline(membership, line)) {
        const size_t first = line.find(':');
        const size_t second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
        if (controllers == ",,") version2 = line.substr(second + 1);
        if (controllers.find(",memory,") != std::string::npos) version1 = line.substr(second + 1);
    }
    return std::min({available_up_to_root(cgroups, version2, kVersion2),
                     available_up_to_root(cgroups + "/unified", version2, kVersion2),
                     available_up_to_root(cgroups + "/memory", version1, kVersion1)});
}

}  // namespace

uint64_t system_memory(const std::string& proc, const std::string& cgroups) {
    const uint64_t in_groups = available_in_groups(proc, cgroups);
    const auto ram = field(proc + "/meminfo", "MemAvailable:");
    return ram ? std::min(*ram * 1024, in_groups) : in_groups;
}

uint64_t available_memory() {
    const uint64_t available = system_memory("/proc", "/sys/fs/cgroup");
    const uint64_t promised = promised_memory();
    return available > promised ? available - promised : 0;
}

}  // namespace moeinf
