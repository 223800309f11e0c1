// What a torch without CUDA lacks to run programs whose tensors say "cuda:0": a device guard for the autograd engine, and hooks that
// hand out generators and pinned memory. Nothing here computes; the tensors themselves are in device.py. Loaded with LD_PRELOAD:
// torch asks for the hooks once, as early as its own import.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <map>
#include <mutex>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

Device only_device() { return Device(DeviceType::CUDA, 0); }

// One device and one stream: what order streams keep is kept track of in Python (streams.py).
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return only_device(); }
  Device getDevice() const override { return only_device(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
};

const Guard guard;
const c10::impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, &guard);

// Memory of the CPU that is remembered as pinned, by where it begins.
struct PinnedMemory final : c10::Allocator {
  static constexpr size_t kAlignment = 64;

  static PinnedMemory& instance() {
    static PinnedMemory* only = new PinnedMemory;
    return *only;
  }

  static void release(void* data) {
    PinnedMemory& own = instance();
    {
      std::lock_guard<std::mutex> lock(own.mutex);
      own.sizes.erase(static_cast<char*>(data));
    }
    std::free(data);
  }

  c10::DataPtr allocate(size_t size) override {
    size = (size / kAlignment + 1) * kAlignment;
    void* data = std::aligned_alloc(kAlignment, size);
    TORCH_CHECK(data, "no memory for ", size, " pinned bytes");
    {
      std::lock_guard<std::mutex> lock(mutex);
      sizes[static_cast<char*>(data)] = size;
    }
    return {data, data, &release, Device(DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

  bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    auto after = sizes.upper_bound(static_cast<char*>(const_cast<void*>(data)));
    if (after == sizes.begin()) return false;
    auto found = std::prev(after);
    return data < found->first + found->second;
  }

  std::mutex mutex;
  std::map<char*, size_t> sizes;
};

}  // namespace

// The registry makes an object of the name CUDAHooks, in the namespace at.
namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(DeviceIndex) const override {}
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
  Allocator* getPinnedMemoryAllocator() const override { return &PinnedMemory::instance(); }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::instance().holds(data); }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at
