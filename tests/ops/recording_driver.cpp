// Stands in for the CUDA driver where there is none, while a graph is captured: refuses what a capture forbids, says yes
// to the rest, and keeps what it was asked last.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>

extern "C" {
struct Recording {
  int64_t retained, loaded, launches;
  uint64_t current, largest_shared, carve_out, stream, extra;
  int64_t capture_mode;
  uint64_t grid[3], block[3], shared;
  char name[64];
  char parameter[512];
};
Recording recording;

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal + 40, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  ++recording.retained;
  *context = reinterpret_cast<void*>(static_cast<uintptr_t>(0xc000 + device));
  return 0;
}
int cuCtxSetCurrent(void* context) { return recording.current = reinterpret_cast<uint64_t>(context), 0; }
int cuModuleLoadData(void** module, const void* image) {
  if (recording.capture_mode != 2) return 900;                     // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
  if (std::memcmp(image, "\x7f" "ELF", 4) != 0) return 200;  // CUDA_ERROR_INVALID_IMAGE
  ++recording.loaded;
  *module = &recording.loaded;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (module != &recording.loaded) return 400;  // CUDA_ERROR_INVALID_HANDLE
  std::strncpy(recording.name, name, sizeof(recording.name) - 1);
  *function = recording.name;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute == 8) recording.largest_shared = value;  // MAX_DYNAMIC_SHARED_SIZE_BYTES
  if (attribute == 9) recording.carve_out = value;       // PREFERRED_SHARED_MEMORY_CARVEOUT
  return function == recording.name ? 0 : 400;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = static_cast<int>(recording.capture_mode);
  recording.capture_mode = *mode, *mode = before;
  return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  if (function != recording.name) return 400;
  if (gx == 0) return 1;  // CUDA_ERROR_INVALID_VALUE
  ++recording.launches;
  const uint64_t grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  std::memcpy(recording.grid, grid, sizeof(grid));
  std::memcpy(recording.block, block, sizeof(block));
  recording.shared = shared;
  recording.stream = reinterpret_cast<uint64_t>(stream), recording.extra = reinterpret_cast<uint64_t>(extra);
  std::memcpy(recording.parameter, parameters[0], 184);
  return 0;
}

int cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* status) {
  *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), symbol);
  if (status) *status = *function ? 0 : 1;
  return 0;
}
int cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}
}
