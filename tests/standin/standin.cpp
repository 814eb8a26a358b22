// A stand-in for a GPU: CUDA's tensors in the CPU's memory.
//
// Loaded before libtorch's first question (LD_PRELOAD), it registers itself as
// libtorch's CUDA half. A tensor of `cuda:0` then is memory of the CPU's under
// CUDA's dispatch key; operators compute with the CPU's kernels. What a GPU
// would refuse is refused, so that code meant for one can be tested without
// one: tensors of two devices in one operator, and raw access by code that
// asks for a tensor of the CPU's. What makes a GPU wait for its host is counted,
// and memory that two streams work on without waiting for each other is refused.
// How fast a GPU is, and how its kernels round, can't be learnt here.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {
using at::Tensor;
using c10::Device;
using c10::IValue;
using c10::Storage;

const Device STANDIN(c10::kCUDA, 0);

std::atomic<int64_t> host_reads{0};
std::atomic<int64_t> launches{0};

// Draws from a seed otherwise than the CPU does, as a GPU would.
struct DeviceGenerator : at::CPUGeneratorImpl {
  DeviceGenerator() : at::CPUGeneratorImpl(67280421310721) {}
  void set_current_seed(uint64_t seed) override { at::CPUGeneratorImpl::set_current_seed(~seed); }
};

const at::Generator& device_generator() {
  static const at::Generator generator = at::make_generator<DeviceGenerator>();
  return generator;
}

// The stream of this thread's operators.
thread_local c10::StreamId current_stream = 0;

// Which work is sure to be done before which: that of one stream in order, and across streams by events only. Of two
// pieces of work on one memory, of which one writes, the later has to wait for the other; and so has the stream that
// memory is given back to.
class Order {
 public:
  // Of each stream, how many pieces of work are done.
  using Clock = std::map<c10::StreamId, int64_t>;

  void work(const void* memory, bool writes, const std::string& name) {
    if (!memory) return;
    std::lock_guard<std::mutex> turn(turns_);
    auto& now = clocks_[current_stream];
    auto& done = done_.try_emplace(memory, Done{current_stream, {}}).first->second;
    for (const auto& [stream, piece, wrote] : done.pieces)
      TORCH_CHECK(!(writes || wrote) || now[stream] >= piece, name, " doesn't wait for what another stream does with ",
                  "the same memory (on the stand-in)");
    auto mine = [](const Piece& other) { return other.stream == current_stream; };
    if (writes) done.pieces.erase(std::remove_if(done.pieces.begin(), done.pieces.end(), mine), done.pieces.end());
    done.pieces.push_back({current_stream, ++now[current_stream], writes});
  }

  void freed(const void* memory) {
    std::lock_guard<std::mutex> turn(turns_);
    auto found = done_.find(memory);
    if (found == done_.end()) return;
    auto& now = clocks_[found->second.owner];
    for (const auto& piece : found->second.pieces)
      if (now[piece.stream] < piece.number) {
        fprintf(stderr, "memory is freed that another stream works on (on the stand-in)\n");
        std::abort();
      }
    done_.erase(found);
  }

  Clock now(c10::StreamId stream) {
    std::lock_guard<std::mutex> turn(turns_);
    return clocks_[stream];
  }

  void wait(c10::StreamId stream, const Clock& until) {
    std::lock_guard<std::mutex> turn(turns_);
    for (auto [other, piece] : until) clocks_[stream][other] = std::max(clocks_[stream][other], piece);
  }

 private:
  struct Piece {
    c10::StreamId stream;
    int64_t number;
    bool writes;
  };
  struct Done {
    c10::StreamId owner;
    std::vector<Piece> pieces;
  };

  std::mutex turns_;
  std::map<c10::StreamId, Clock> clocks_;
  std::map<const void*, Done> done_;
};

Order& order() {
  static auto* const order = new Order;
  return *order;
}

void forget(void* given) {
  auto* storage = static_cast<Storage*>(given);
  if (storage->use_count() == 1) order().freed(storage->data());
  delete storage;
}

// The same memory, as of another device.
Storage as_of(const Storage& storage, Device device) {
  at::DataPtr data(storage.mutable_data(), new Storage(storage), &forget, device);
  return Storage(Storage::use_byte_size_t(), storage.nbytes(), std::move(data), at::getCPUAllocator(), true);
}

// The tensors of one call: those of the stand-in, and what the CPU sees of them.
class Call {
 public:
  IValue to_cpu(const IValue& value) {
    if (value.isTensor()) return to_cpu(value.toTensor());
    if (value.isDevice()) {
      on_device |= value.toDevice().is_cuda();
      return value.toDevice().is_cuda() ? Device(c10::kCPU) : value;
    }
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(to_cpu(t));
      return list;
    }
    if (value.isList() && !value.isIntList()) {
      // Indices, some of them absent. In TorchScript the list's type may say more of them than the schema does,
      // so libtorch's own question, `isOptionalTensorList`, isn't to be asked.
      auto given = value.toList();
      c10::impl::GenericList list(given.elementType());
      for (const IValue& item : given.vec()) list.push_back(to_cpu(item));
      return list;
    }
    return value;
  }

  IValue to_device(const IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(to_device(t));
      return list;
    }
    return value;
  }

  // Tensors that the operator gave another size or other memory.
  void follow() {
    for (auto& [there, here] : pairs_) {
      auto impl = there.unsafeGetTensorImpl();
      if (here.storage().data() != there.storage().data()) {
        auto storage = there.storage().unsafeGetStorageImpl();
        auto moved = as_of(here.storage(), STANDIN);
        storage->set_nbytes(moved.nbytes());
        storage->set_data_ptr_noswap(std::move(moved.unsafeGetStorageImpl()->mutable_data_ptr()));
      }
      if (here.sizes() != there.sizes() || here.strides() != there.strides())
        impl->set_sizes_and_strides(here.sizes(), here.strides(), here.storage_offset());
    }
  }

  bool mixes() const {
    for (const auto& t : plain_)
      if (t.dim() > 0 && !pairs_.empty()) return true;
    return false;
  }

  // What operators of the device did with their tensors' memory, given which of their arguments they write.
  void in_order(const std::string& name, const std::vector<const void*>& written) const {
    for (const auto& [there, here] : pairs_) {
      const void* memory = here.storage().data();
      order().work(memory, std::count(written.begin(), written.end(), memory) > 0, name);
    }
  }

  bool crosses() const { return !pairs_.empty() && !plain_.empty(); }

  bool on_device = false;

 private:
  Tensor to_cpu(const Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      plain_.push_back(t);
      return t;
    }
    on_device = true;
    for (auto& [there, here] : pairs_)
      if (there.is_same(t)) return here;
    auto impl = c10::make_intrusive<c10::TensorImpl>(storage_of(t), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.dim() == 0) impl->set_wrapped_number(t.unsafeGetTensorImpl()->is_wrapped_number());
    pairs_.emplace_back(t, Tensor(std::move(impl)));
    return pairs_.back().second;
  }

  Tensor to_device(const Tensor& t) {
    if (!t.defined() || !on_device) return t;
    for (auto& [there, here] : pairs_)
      if (here.is_same(t)) return there;
    for (const auto& other : plain_)
      if (other.is_same(t)) return t;
    auto impl =
        c10::make_intrusive<c10::TensorImpl>(storage_back(t), c10::DispatchKeySet(c10::DispatchKey::CUDA), t.dtype());
    impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    return Tensor(std::move(impl));
  }

  // Views of one storage stay views of one.
  Storage storage_of(const Tensor& t) {
    for (auto& [there, here] : pairs_)
      if (there.storage().is_alias_of(t.storage())) return here.storage();
    return as_of(t.storage(), c10::kCPU);
  }

  Storage storage_back(const Tensor& t) {
    for (auto& [there, here] : pairs_)
      if (here.storage().is_alias_of(t.storage())) return there.storage();
    order().work(t.storage().data(), true, "a new tensor");
    return as_of(t.storage(), STANDIN);
  }

  std::vector<std::pair<Tensor, Tensor>> pairs_;
  std::vector<Tensor> plain_;
};

// Operators whose result, or whose result's shape, the host has to know.
const std::set<std::string> READS = {"aten::_local_scalar_dense", "aten::equal",         "aten::nonzero",
                                     "aten::masked_select",       "aten::_unique2",      "aten::unique_dim",
                                     "aten::unique_consecutive",  "aten::repeat_interleave.Tensor"};

// Operators that may read, or write, a tensor of another device.
const std::set<std::string> CROSSINGS = {"aten::copy_", "aten::index.Tensor", "aten::index_put_",
                                         "aten::_index_put_impl_", "aten::set_.source_Tensor"};

const std::set<std::string> VIEWS = {"aten::view",       "aten::as_strided",    "aten::_reshape_alias", "aten::unfold",
                                     "aten::alias",      "aten::view_as_real",  "aten::set_",           "aten::resize_",
                                     "aten::view.dtype", "aten::empty_strided", "aten::empty"};

// A softmax in f32 of halves is one operator there (an `out` variant, as libtorch has it from the others), which the
// CPU has in two steps. Answers the output of a gradient that is still to be cast.
Tensor widen_softmax(const std::string& full, c10::IValue* arguments) {
  if ((full == "aten::_softmax.out" || full == "aten::_log_softmax.out") && arguments[2].toBool()) {
    arguments[0] = arguments[0].toTensor().to(at::kFloat);
    arguments[2] = false;
  } else if (full == "aten::_softmax_backward_data.out" || full == "aten::_log_softmax_backward_data.out") {
    const auto wide = arguments[0].toTensor().scalar_type();
    if (arguments[3].toScalarType() != wide) {
      auto out = arguments[4].toTensor();
      arguments[3] = static_cast<int64_t>(wide);
      arguments[4] = at::empty(out.sizes(), at::TensorOptions(wide));
      return out;
    }
  }
  return Tensor();
}

void call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  auto full = schema.overload_name().empty() ? name : name + "." + schema.overload_name();
  const auto n = schema.arguments().size(), base = stack->size() - n;
  // What is of the device after all would come back here, until the stack is full.
  thread_local int depth = 0;
  struct Inside {
    Inside() { depth++; }
    ~Inside() { depth--; }
  } inside;
  TORCH_CHECK(depth < 16, "the stand-in doesn't know all the arguments of ", full);
  Call call;
  bool masks = false;
  std::vector<const void*> written;
  for (size_t i = 0; i < n; i++) {
    auto& value = (*stack)[base + i];
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias && alias->isWrite()) {
      if (value.isTensor() && value.toTensor().defined()) written.push_back(value.toTensor().storage().data());
      if (value.isTensorList())
        for (const Tensor& t : value.toTensorVector()) written.push_back(t.storage().data());
    }
    if (value.isList() && name.find("index") != std::string::npos)
      for (const IValue& t : value.toListRef())
        masks |= t.isTensor() && t.toTensor().defined() &&
                 (t.toTensor().scalar_type() == at::kBool || t.toTensor().scalar_type() == at::kByte);
    value = call.to_cpu(value);
  }
  const bool crosses = CROSSINGS.count(name) || CROSSINGS.count(full);
  TORCH_CHECK(crosses || !call.mixes(), "Expected all tensors to be on the same device, but found at least two devices, ",
              "cuda:0 and cpu! (", name, ", on the stand-in)");
  bool blocks = true;
  if (name == "aten::copy_") blocks = !(*stack)[base + 2].toBool();
  if (READS.count(name) || READS.count(full) || masks || (crosses && call.crosses() && blocks)) host_reads++;
  if (!VIEWS.count(name) && !VIEWS.count(full)) launches++;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Tensor narrow = widen_softmax(full, stack->data() + base);
    if (call.on_device && op.hasTag(at::Tag::nondeterministic_seeded)) {
      // Operators draw from the CPU's generator: it gets the device's state for so long.
      static std::mutex turns;
      std::lock_guard<std::mutex> turn(turns);
      auto cpu = at::detail::getDefaultCPUGenerator();
      auto before = cpu.get_state();
      cpu.set_state(device_generator().get_state());
      op.callBoxed(stack);
      at::Generator(device_generator()).set_state(cpu.get_state());
      cpu.set_state(before);
    } else {
      op.callBoxed(stack);
    }
    if (narrow.defined()) {
      narrow.copy_(stack->back().toTensor());
      stack->back() = narrow;
    }
  }
  if (!VIEWS.count(name) && !VIEWS.count(full)) call.in_order(full, written);
  call.follow();
  const auto results = schema.returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); i++) (*stack)[i] = call.to_device((*stack)[i]);
}

// The plain formula of attention, which every kernel of a GPU's stands for.
void choose_sdp(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
  stack->emplace_back(int64_t{0});
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device) const override { return STANDIN; }
  Device getDevice() const override { return STANDIN; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override {
    static std::atomic<c10::StreamId> last{0};
    return stream(++last);
  }
  c10::Stream exchangeStream(c10::Stream to) const override { return stream(std::exchange(current_stream, to.id())); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Order::Clock;
    *static_cast<Order::Clock*>(*event) = order().now(stream.id());
  }
  void block(void* event, const c10::Stream& stream) const override {
    order().wait(stream.id(), *static_cast<Order::Clock*>(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Order::Clock*>(event);
  }
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { host_reads++; }
  void synchronizeEvent(void*) const override { host_reads++; }
  void synchronizeDevice(const c10::DeviceIndex) const override { host_reads++; }

 private:
  static c10::Stream stream(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, STANDIN, id); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// libtorch asks for a class of this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  at::DeviceIndex current_device() const override { return 0; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  at::DeviceIndex exchangeDevice(at::DeviceIndex) const override { return 0; }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  Device getDeviceFromPtr(void*) const override { return STANDIN; }
  const at::Generator& getDefaultGenerator(at::DeviceIndex) const override { return device_generator(); }
  at::Generator getNewGenerator(at::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void deviceSynchronize(at::DeviceIndex) const override { host_reads++; }
  std::string showConfig() const override { return "a stand-in"; }
  // Two questions that reach here from every libtorch binding, and whose answers mean nothing else here.
  long versionCUDART() const override { return host_reads; }
  long versionCuDNN() const override { return launches; }
};

}  // namespace

namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&call>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // For these, libtorch has one kernel for all devices, which looks for the device's own further down.
  for (auto name : {"copy_", "convolution_overrideable", "convolution", "_convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&call>());
  m.impl("_fused_sdp_choice", torch::CppFunction::makeFromBoxedFunction<&choose_sdp>());
}
