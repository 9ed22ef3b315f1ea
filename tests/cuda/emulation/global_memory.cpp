#include "global_memory.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace dpn::emulation {

namespace {

// Bytes of tensors times blocks: some milliseconds.
constexpr std::size_t kMostBytes = std::size_t{1} << 25;

}  // namespace

void GlobalMemory::set_tensors(unsigned char* const* begins, const std::int64_t* sizes, std::int64_t count) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return begins[a] < begins[b]; });
  regions_.clear();
  num_bytes_ = 0;
  unsigned char* end = nullptr;
  for (const std::int64_t i : order) {
    unsigned char* const begin = std::max(begins[i], end);  // a byte in two tensors belongs to one region
    if (begins[i] + sizes[i] <= begin) continue;
    end = begins[i] + sizes[i];
    const auto size = static_cast<std::size_t>(end - begin);
    num_bytes_ += size;
    if (num_bytes_ > kMostBytes) return;
    const std::vector<unsigned char> unset(size);
    regions_.push_back({begin, unset, unset, unset, unset, unset});
  }
}

void GlobalMemory::begin_launch(std::size_t num_blocks) {
  is_weak_ = num_blocks > 1 && num_bytes_ * num_blocks <= kMostBytes;
  if (!is_weak_) return;
  for (Region& r : regions_) {
    for (auto* copy : r.copies()) std::copy_n(r.begin, copy->size(), copy->begin());
  }
}

void GlobalMemory::release() {
  if (!is_weak_) return;
  for (Region& r : regions_) std::copy_n(r.begin, r.fenced.size(), r.fenced.begin());
}

void GlobalMemory::publish() {
  for (Region& r : regions_) {
    for (std::size_t i = 0; i < r.seen.size(); ++i) {
      if (r.fenced[i] != r.seen[i]) r.published[i] = r.at_end[i] = r.fenced[i];
    }
  }
}

void GlobalMemory::acquire() {
  if (!is_weak_) return;
  for (Region& r : regions_) {
    for (std::size_t i = 0; i < r.seen.size(); ++i) {
      if (r.begin[i] == r.seen[i]) r.begin[i] = r.published[i];
      if (r.fenced[i] == r.seen[i]) r.fenced[i] = r.published[i];
      r.seen[i] = r.published[i];
    }
  }
}

void GlobalMemory::end_block() {
  if (!is_weak_) return;
  for (Region& r : regions_) {
    const std::size_t size = r.seen.size();
    if (std::memcmp(r.begin, r.seen.data(), size) != 0) {
      for (std::size_t i = 0; i < size; ++i) {
        if (r.begin[i] != r.seen[i]) r.at_end[i] = r.begin[i];
      }
    }
    std::copy_n(r.at_start.begin(), size, r.begin);
    r.seen = r.fenced = r.at_start;
  }
}

void GlobalMemory::end_launch() {
  if (!is_weak_) return;
  for (Region& r : regions_) std::copy(r.at_end.begin(), r.at_end.end(), r.begin);
  is_weak_ = false;
}

void GlobalMemory::keep_for_all(unsigned char* address, const unsigned char* value, std::size_t size) {
  if (!is_weak_) return;
  for (Region& r : regions_) {
    if (address < r.begin || address >= r.begin + r.seen.size()) continue;
    publish();
    const auto offset = address - r.begin;
    for (auto* copy : r.copies()) std::copy_n(value, size, copy->begin() + offset);
    return;
  }
}

GlobalMemory& global_memory() {
  static GlobalMemory instance;
  return instance;
}

}  // namespace dpn::emulation
