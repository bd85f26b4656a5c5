#include <stdexcept>
#include <string>

#include "gather.h"

namespace ppf {
namespace {

[[noreturn]] void out_of_range(const char* name, int64_t position, int64_t value, int64_t limit) {
  const std::string found = std::string(name) + "[" + std::to_string(position) + "] = " + std::to_string(value);
  const std::string rule = limit > 0 ? "Use values from 0 to " + std::to_string(limit - 1) : "The dimension is empty";
  throw std::out_of_range(found + ": out of range for a dimension of size " + std::to_string(limit) + ". " + rule);
}

// True if every aligned block of `unit` entries is `unit` consecutive channels that start at a multiple of `unit`.
bool in_units(const int32_t* index, int64_t count, int unit) {
  if (count % unit != 0) return false;
  for (int64_t block = 0; block < count; block += unit) {
    bool whole = index[block] % unit == 0;
    for (int i = 1; i < unit; ++i) whole &= index[block + i] == index[block] + i;
    if (!whole) return false;
  }
  return true;
}

template <class Integer>
void checked_copy(const char* name, const Integer* index, int64_t count, int64_t limit, int32_t* packed) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t value = index[i];
    if (value < 0 || value >= limit) out_of_range(name, i, value, limit);
    packed[i] = static_cast<int32_t>(value);
  }
}

}  // namespace

int pack_index(const char* name, const void* index, int index_size, int64_t count, int64_t limit, int32_t* packed) {
  if (index_size == 4) {
    checked_copy(name, static_cast<const int32_t*>(index), count, limit, packed);
  } else {
    checked_copy(name, static_cast<const int64_t*>(index), count, limit, packed);
  }
  for (int unit = 8; unit > 1; unit /= 2) {
    if (in_units(packed, count, unit)) return unit;
  }
  return 1;
}

}  // namespace ppf
