// Loads libtorch's CUDA half at start-up.
//
// A Rust program links libtorch_cuda by name only, so the linker drops it and
// `Device::cuda_if_available()` would answer CPU. It is loaded here, from the
// folder that libtorch_cpu came from, when the machine has a CUDA driver.
//
// And what kernels of our own need of libtorch: that folder, beside which NVRTC
// lies, and the stream to run on.
#include <ATen/Context.h>
#include <c10/core/impl/VirtualGuardImpl.h>

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

// The CUstream that libtorch's operators run on, on this device and thread.
extern "C" char* tp_cuda_stream(int device, void** stream) {
  return tch_peft::guarded([&] {
    c10::impl::VirtualGuardImpl cuda(c10::kCUDA);
    *stream = cuda.getStream(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device))).native_handle();
  });
}
