#include "core/amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dpn {

namespace {

#if defined(__x86_64__) && defined(__linux__)

bool processor_has_tiles() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAll) == kAll;
}

// XCR0: the operating system saves the configuration (bit 17) and the contents (bit 18) of tiles.
bool system_saves_tiles() {
  constexpr unsigned kOsXsave = 1u << 27, kTiles = 1u << 17 | 1u << 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kOsXsave)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTiles) == kTiles;
}

// Linux gives the memory for tiles only to processes that ask. It refuses where some thread has an alternative signal
// stack that is too small for them.
bool request_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else

bool processor_has_tiles() { return false; }
bool system_saves_tiles() { return false; }
bool request_tiles() { return false; }

#endif

}  // namespace

bool has_amx() {
  static const bool has = processor_has_tiles() && system_saves_tiles() && request_tiles();
  return has;
}

}  // namespace dpn
