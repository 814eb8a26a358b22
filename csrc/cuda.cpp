// Loads libtorch's CUDA half at start-up.
//
// A Rust program links libtorch_cuda by name only, so the linker drops it and
// `Device::cuda_if_available()` would answer CPU. It is loaded here, from the
// folder that libtorch_cpu came from, when the machine has a CUDA driver.
//
// And what kernels of our own need of libtorch: that folder, beside which NVRTC
// lies, the stream to run on, and a second one beside it.
#include <ATen/Context.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <string>

#include "tch_peft.h"

#if defined(__linux__)
#include <dlfcn.h>

namespace {

std::string libtorch_folder() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(&at::globalContext), &info) || !info.dli_fname) return "";
  std::string path = info.dli_fname;
  auto slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

const std::string& folder() {
  static const std::string path = libtorch_folder();
  return path;
}

std::string load_cuda() {
  if (!dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL)) return "no CUDA driver (libcuda.so.1)";
  auto path = folder() + "libtorch_cuda.so";
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) return "loaded " + path;
  const char* reason = dlerror();
  return "CPU-only: " + std::string(reason ? reason : "libtorch_cuda.so was not found");
}

}  // namespace

extern "C" const char* tp_cuda_status() {
  static const std::string status = load_cuda();
  return status.c_str();
}

extern "C" const char* tp_libtorch_folder() { return folder().c_str(); }
#else
extern "C" const char* tp_cuda_status() { return "not loaded: only on Linux"; }
extern "C" const char* tp_libtorch_folder() { return ""; }
#endif

namespace {

c10::Device cuda_device(int index) { return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index)); }

}  // namespace

// The stream that libtorch's operators run on, on a device and this thread, and another of the same device.
struct tp_streams {
  c10::impl::VirtualGuardImpl cuda{c10::kCUDA};
  c10::Stream main, side;
  c10::Event reached_by_main{c10::kCUDA}, reached_by_side{c10::kCUDA};

  explicit tp_streams(c10::Device device) : main(cuda.getStream(device)), side(side_of(device)) {}

 private:
  // One for each thread: two that share one would wait for each other.
  c10::Stream side_of(c10::Device device) {
    thread_local std::map<c10::DeviceIndex, c10::Stream> sides;
    auto found = sides.find(device.index());
    if (found == sides.end()) found = sides.emplace(device.index(), cuda.getStreamFromGlobalPool(device)).first;
    return found->second;
  }
};

extern "C" {

// The CUstream that libtorch's operators run on, on this device and thread.
char* tp_cuda_stream(int device, void** stream) {
  return tch_peft::guarded([&] {
    c10::impl::VirtualGuardImpl cuda(c10::kCUDA);
    *stream = cuda.getStream(cuda_device(device)).native_handle();
  });
}

char* tp_streams_new(int device, tp_streams** streams) {
  return tch_peft::guarded([&] { *streams = new tp_streams(cuda_device(device)); });
}

void tp_streams_free(tp_streams* streams) { delete streams; }

// Makes the side, or else the main stream, wait for all that the other was given so far.
char* tp_streams_wait(tp_streams* streams, bool side) {
  return tch_peft::guarded([&] {
    auto& reached = side ? streams->reached_by_main : streams->reached_by_side;
    reached.record(side ? streams->main : streams->side);
    reached.block(side ? streams->side : streams->main);
  });
}

// Makes the side, or the main stream again, the one that operators of this thread run on.
char* tp_streams_use(tp_streams* streams, bool side) {
  return tch_peft::guarded([&] { streams->cuda.exchangeStream(side ? streams->side : streams->main); });
}
}
