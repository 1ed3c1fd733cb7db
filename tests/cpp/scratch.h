// Files that are removed after the test, and random bytes for them.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>
#include <span>
#include <string>
#include <vector>

class ScratchFolder {
public:
    // In the folder the test runs in: a build folder is on a disk, /tmp may not be.
    ScratchFolder() {
        std::string pattern = "scratch-XXXXXX";
        if (mkdtemp(pattern.data()) == nullptr) {
            std::perror("mkdtemp");
            std::exit(EXIT_FAILURE);
        }
        path_ = std::filesystem::absolute(pattern);
    }
    ~ScratchFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    ScratchFolder(const ScratchFolder&) = delete;
    ScratchFolder& operator=(const ScratchFolder&) = delete;

    [[nodiscard]] std::string path(const std::string& name) const { return path_ / name; }

    [[nodiscard]] std::string write(const std::string& name,
                                    std::span<const std::byte> content) const {
        const std::string file = path(name);
        std::ofstream(file, std::ios::binary)
            .write(reinterpret_cast<const char*>(content.data()),
                   static_cast<std::streamsize>(content.size()));
        return file;
    }

private:
    std::filesystem::path path_;
};

inline std::vector<std::byte> random_bytes(size_t count, std::mt19937_64& random) {
    std::vector<std::byte> bytes(count);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
    return bytes;
}

// New on every run, the same for all cases of it; printed, so that a failure can be repeated with
// SEED=number.
inline uint64_t drawn_seed() {
    static const uint64_t seed = [] {
        const char* given = std::getenv("SEED");
        const uint64_t drawn = given != nullptr ? std::stoull(given) : std::random_device{}();
        std::cout << "seed " << drawn << std::endl;
        return drawn;
    }();
    return seed;
}
