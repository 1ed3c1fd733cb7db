#include "memory/available.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace moeinf {
namespace {

constexpr uint64_t kUnknown = std::numeric_limits<uint64_t>::max();

// The lines of a small file; none if it cannot be read. By the C library: the streams of C++ read
// numbers through the locale facets of the process, which other libraries may have replaced.
std::vector<std::string> lines(const std::string& path) {
    std::vector<std::string> found;
    const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "re"), std::fclose);
    if (!file) return found;
    std::array<char, 512> part;
    bool begins = true;
    while (std::fgets(part.data(), part.size(), file.get()) != nullptr) {
        if (begins) found.emplace_back();
        found.back() += part.data();
        begins = found.back().back() == '\n';
        if (begins) found.back().pop_back();
    }
    return found;
}

std::optional<uint64_t> number(const char* text) {
    while (*text == ' ' || *text == '\t') ++text;
    if (*text < '0' || *text > '9') return std::nullopt;
    return std::strtoull(text, nullptr, 10);
}

// The number after `key` in a file of "key number" lines.
std::optional<uint64_t> field(const std::string& path, const std::string& key) {
    for (const std::string& line : lines(path)) {
        if (line.compare(0, key.size(), key) == 0 && line.size() > key.size() &&
            (line[key.size()] == ' ' || line[key.size()] == '\t')) {
            return number(line.c_str() + key.size());
        }
    }
    return std::nullopt;
}

// The number in a file; none if the file is missing or says "max".
std::optional<uint64_t> whole(const std::string& path) {
    const std::vector<std::string> text = lines(path);
    return text.empty() ? std::nullopt : number(text[0].c_str());
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
    for (const std::string& line : lines(proc + "/self/cgroup")) {  // number:controllers:group
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
