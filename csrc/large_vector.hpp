// SPDX-License-Identifier: Apache-2.0
// A std::vector for scratch memory as large as the batch.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace g2rpo {

namespace detail {

// Leaves elements uninitialised, and asks for huge pages where many are needed: at 4 KiB a page, the first touch of
// every page costs the system more time than the op takes to fill it.
template <class T>
class LargeAllocator {
public:
    using value_type = T;

    LargeAllocator() = default;
    template <class U>
    LargeAllocator(const LargeAllocator<U>&) {}

    T* allocate(std::size_t count) {
#if defined(__linux__)
        if (count * sizeof(T) >= threshold) {
            // One huge page more than needed, so that an aligned part can be kept.
            const std::size_t bytes = rounded(count), mapped = bytes + huge_page;
            void* const first = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (first == MAP_FAILED) throw std::bad_alloc();
            void* aligned = first;
            std::size_t space = mapped;
            std::align(huge_page, bytes, aligned, space);
            if (space < mapped) munmap(first, mapped - space);
            if (space > bytes) munmap(static_cast<char*>(aligned) + bytes, space - bytes);
            madvise(aligned, bytes, MADV_HUGEPAGE);  // a wish: without huge pages the memory is as good
            return static_cast<T*>(aligned);
        }
#endif
        return std::allocator<T>().allocate(count);
    }

    void deallocate(T* pointer, std::size_t count) {
#if defined(__linux__)
        if (count * sizeof(T) >= threshold) {
            munmap(pointer, rounded(count));
            return;
        }
#endif
        std::allocator<T>().deallocate(pointer, count);
    }

    // Default initialisation, which leaves numbers as they are, where std::allocator has value initialisation.
    template <class U>
    void construct(U* pointer) {
        ::new (static_cast<void*>(pointer)) U;
    }
    template <class U, class... Args>
    void construct(U* pointer, Args&&... args) {
        ::new (static_cast<void*>(pointer)) U(std::forward<Args>(args)...);
    }

    template <class U>
    bool operator==(const LargeAllocator<U>&) const {
        return true;
    }
    template <class U>
    bool operator!=(const LargeAllocator<U>&) const {
        return false;
    }

private:
    static constexpr std::size_t huge_page = std::size_t{1} << 21, threshold = huge_page;

    // Bytes, in whole huge pages.
    static std::size_t rounded(std::size_t count) {
        return (count * sizeof(T) + huge_page - 1) / huge_page * huge_page;
    }
};

}  // namespace detail

// resize() leaves new elements uninitialised.
template <class T>
using LargeVector = std::vector<T, detail::LargeAllocator<T>>;

}  // namespace g2rpo
