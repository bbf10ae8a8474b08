// Hash tables of lattice keys. Internal.
#pragma once

#include <cstdint>
#include <utility>

#include "passes.h"

namespace deeplab_kernels::cpu {

// Open addressing with the keys in the table; grows before it is half full. Hashes are those of the keys.
template <typename Key>
class KeyTable {
 public:
  KeyTable() = default;
  explicit KeyTable(int64_t expected) {
    int bits = 6;
    while ((int64_t{1} << bits) < 2 * expected) ++bits;
    resize(bits);
  }

  // Index of the key, or -1.
  int32_t find(const Key& key, uint64_t hash) const {
    for (uint64_t h = hash >> shift_;; h = (h + 1) & mask_) {
      const Entry& entry = entries_[int64_t(h)];
      if (entry.index < 0 || entry.key == key) return entry.index;
    }
  }

  // Index of the key, which becomes `index` if it is new.
  int32_t find_or_insert(const Key& key, uint64_t hash, int32_t index) {
    for (uint64_t h = hash >> shift_;; h = (h + 1) & mask_) {
      Entry& entry = entries_[int64_t(h)];
      if (entry.index < 0) {
        entry = {key, index};
        if (2 * ++count_ >= entries_.size()) grow();
        return index;
      }
      if (entry.key == key) return entry.index;
    }
  }

  void prefetch(uint64_t hash) const { __builtin_prefetch(entries_.data() + (hash >> shift_)); }

  void clear() {
    count_ = 0;
    for (int64_t i = 0; i < entries_.size(); ++i) entries_[i].index = -1;
  }

 private:
  struct Entry {
    Key key;
    int32_t index;
  };

  void resize(int bits) {
    entries_ = Buffer<Entry>(int64_t{1} << bits);
    shift_ = 64 - bits;
    mask_ = (uint64_t{1} << bits) - 1;
    clear();
  }

  void grow() {
    Buffer<Entry> old;
    std::swap(old, entries_);
    const int64_t count = count_;
    resize(65 - shift_);
    count_ = count;
    for (int64_t i = 0; i < old.size(); ++i) {
      if (old[i].index < 0) continue;
      uint64_t h = old[i].key.hash() >> shift_;
      while (entries_[int64_t(h)].index >= 0) h = (h + 1) & mask_;
      entries_[int64_t(h)] = old[i];
    }
  }

  Buffer<Entry> entries_;
  int shift_ = 0;
  uint64_t mask_ = 0;
  int64_t count_ = 0;
};

// Says of most keys that are not there that they are not; small enough for the second-level cache where a table is not.
class KeyFilter {
 public:
  KeyFilter() = default;
  explicit KeyFilter(int64_t expected) {
    int bits = 9;
    while ((int64_t{1} << bits) < 8 * expected) ++bits;
    words_ = Buffer<uint64_t>(int64_t{1} << (bits - 6));
    shift_ = 64 - bits;
    for (int64_t i = 0; i < words_.size(); ++i) words_[i] = 0;
  }
  void insert(uint64_t hash) { words_[int64_t(hash >> shift_ >> 6)] |= uint64_t{1} << (hash >> shift_ & 63); }
  void prefetch(uint64_t hash) const { __builtin_prefetch(words_.data() + (hash >> shift_ >> 6)); }
  bool may_have(uint64_t hash) const { return words_[int64_t(hash >> shift_ >> 6)] >> (hash >> shift_ & 63) & 1; }

 private:
  Buffer<uint64_t> words_;
  int shift_ = 0;
};

}  // namespace deeplab_kernels::cpu
