#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <thread>

#include "check.hpp"
#include "packing/casts.hpp"
#include "packing/pack.hpp"

using namespace pe;

namespace {

constexpr std::byte kPoison{0xA5};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A tensor that owns its memory, with random strides, some of them negative.
struct Tensor {
  std::vector<std::byte> memory;
  std::vector<std::int64_t> shape, strides;
  std::int64_t first = 0;
  DType dtype;

  Tensor(DType type, std::vector<std::int64_t> lengths, std::mt19937& random)
      : shape(std::move(lengths)), strides(shape.size()), dtype(type) {
    std::vector<std::size_t> order(shape.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    std::int64_t stride = 1;
    for (const std::size_t d : order) {
      strides[d] = stride * (1 + static_cast<std::int64_t>(random() % 2));
      stride = strides[d] * std::max<std::int64_t>(shape[d], 1);
      if (random() % 3 == 0 && shape[d] > 0) {
        first += strides[d] * (shape[d] - 1);
        strides[d] = -strides[d];
      }
    }
    memory.resize(stride * dtype.size());
    for (std::byte& byte : memory) byte = static_cast<std::byte>(random());
  }

  Strided strided() {
    return {memory.data() + first * static_cast<std::int64_t>(dtype.size()), dtype, shape, strides};
  }

  // Element number i in row-major order.
  std::byte* at(std::int64_t i) {
    std::int64_t element = first;
    for (std::size_t d = shape.size(); d-- > 0;) {
      element += i % shape[d] * strides[d];
      i /= shape[d];
    }
    return memory.data() + element * static_cast<std::int64_t>(dtype.size());
  }
};

struct Buffer {
  explicit Buffer(std::int64_t nbytes) : length(nbytes), lines(nbytes / 64 + 1) {
    std::memset(data(), static_cast<int>(kPoison), lines.size() * sizeof(Line));
  }

  struct alignas(64) Line {
    std::byte bytes[64];
  };

  std::byte* data() { return reinterpret_cast<std::byte*>(lines.data()); }
  Strided strided() { return {data(), kUint8, {&length, 1}, {&kOne, 1}}; }

  static constexpr std::int64_t kOne = 1;
  std::int64_t length;
  std::vector<Line> lines;
};

Packer packer_of(std::vector<Tensor>& tensors, DType wire = {}) {
  std::vector<Slot> slots;
  std::int64_t end = 0;
  for (Tensor& tensor : tensors) {
    const DType travels = wire == DType{} || !is_arithmetic(tensor.dtype) ? tensor.dtype : wire;
    const std::int64_t offset = (end + 255) / 256 * 256;
    slots.push_back({offset, tensor.dtype, travels, tensor.shape});
    end = offset + tensor.strided().size() * static_cast<std::int64_t>(travels.size());
  }
  return Packer(std::move(slots), end);
}

std::vector<Strided> strided(std::vector<Tensor>& tensors) {
  std::vector<Strided> all;
  all.reserve(tensors.size());
  for (Tensor& tensor : tensors) all.push_back(tensor.strided());
  return all;
}

std::vector<Tensor> random_tensors(std::mt19937& random, std::initializer_list<DType> types) {
  std::vector<Tensor> tensors;
  for (int count = random() % 5; count > 0; --count) {
    std::vector<std::int64_t> shape(random() % 5);
    for (std::int64_t& length : shape) length = random() % 9 == 0 ? random() % 2 : 1 + random() % 20;
    tensors.emplace_back(types.begin()[random() % types.size()], std::move(shape), random);
  }
  return tensors;
}

float cast(float value, DType to) {
  std::uint32_t stored = 0;
  float back = 0.0f;
  encode(&value, 1.0f, to, &stored, 1);
  return *decode(to, &stored, &back, 1);
}

}  // namespace

TEST(any_strides_are_packed_row_by_row_and_unpacked) {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    std::vector<Tensor> tensors =
        random_tensors(random, {kUint8, kFloat16, kInt32, kFloat32, dtype_of("int64")});
    const Packer packer = packer_of(tensors);
    Buffer buffer(packer.nbytes() + 64);
    packer.pack(strided(tensors), buffer.strided(), {}, {});

    std::vector<std::byte> expected(buffer.data(), buffer.data() + buffer.length);
    std::fill(expected.begin(), expected.end(), kPoison);
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      const std::size_t element = tensors[t].dtype.size();
      for (std::int64_t i = 0; i < tensors[t].strided().size(); ++i) {
        std::memcpy(&expected[packer.slots()[t].offset + i * element], tensors[t].at(i), element);
      }
    }
    CHECK(std::equal(expected.begin(), expected.end(), buffer.data()));

    const std::vector<Tensor> before = tensors;
    for (Tensor& tensor : tensors) {
      for (std::int64_t i = 0; i < tensor.strided().size(); ++i) {
        std::memset(tensor.at(i), 0, tensor.dtype.size());
      }
    }
    packer.unpack(strided(tensors), buffer.strided(), {}, false);
    for (std::size_t t = 0; t < tensors.size(); ++t) CHECK(tensors[t].memory == before[t].memory);
  }
}

TEST(every_number_of_a_small_type_is_kept) {
  for (const DType dtype : {kFloat16, kBfloat16, kFloat8E4m3fn, kFloat8E5m2}) {
    for (std::uint32_t bits = 0; bits < 1u << dtype.bits; ++bits) {
      float value = 0.0f;
      std::uint32_t back = 0;
      decode(dtype, &bits, &value, 1);
      encode(&value, 1.0f, dtype, &back, 1);
      if (std::isnan(value)) {
        float again = 0.0f;
        CHECK(std::isnan(*decode(dtype, &back, &again, 1)));
      } else {
        CHECK_EQ(back, bits);
      }
    }
  }
}

TEST(halfway_goes_to_the_even_number_and_a_little_more_upward) {
  for (const DType dtype : {kFloat16, kBfloat16, kFloat8E4m3fn, kFloat8E5m2}) {
    const std::uint32_t numbers = dtype == kFloat8E4m3fn ? 0x7e
                                  : dtype == kFloat8E5m2 ? 0x7b
                                  : dtype == kFloat16    ? 0x7bff
                                                         : 0x7f7f;
    for (std::uint32_t bits = 0; bits < numbers; ++bits) {
      const std::uint32_t next = bits + 1;
      float low = 0.0f, high = 0.0f;
      decode(dtype, &bits, &low, 1);
      decode(dtype, &next, &high, 1);
      const float halfway = low / 2 + high / 2;
      if (halfway == low) continue;  // float32's own subnormal numbers end here
      std::uint32_t found = 0, above = 0, below = 0;
      const float more = std::nextafter(halfway, kInf), less = std::nextafter(halfway, 0.0f);
      encode(&halfway, 1.0f, dtype, &found, 1);
      encode(&more, 1.0f, dtype, &above, 1);
      encode(&less, -1.0f, dtype, &below, 1);
      CHECK_EQ(found, bits % 2 == 0 ? bits : next);
      CHECK_EQ(above, next);
      CHECK_EQ(below, bits | 1u << (dtype.bits - 1));
    }
  }
}

TEST(the_range_of_a_type_ends_as_torch_ends_it) {
  for (const float large : {470.0f, 1e6f, kInf}) {
    for (const float sign : {1.0f, -1.0f}) CHECK_EQ(cast(sign * large, kFloat8E4m3fn), sign * 448.0f);
  }
  CHECK_EQ(cast(61439.0f, kFloat8E5m2), 57344.0f);
  CHECK_EQ(cast(61440.0f, kFloat8E5m2), kInf);
  CHECK_EQ(cast(65519.0f, kFloat16), 65504.0f);
  CHECK_EQ(cast(-65520.0f, kFloat16), -kInf);
  CHECK_EQ(cast(3.4e38f, kBfloat16), kInf);
  for (const DType dtype : {kFloat16, kBfloat16, kFloat8E4m3fn, kFloat8E5m2}) {
    CHECK(std::isnan(cast(kNan, dtype)));
  }
}

TEST(sums_and_scales_are_in_the_tensors_arithmetic) {
  std::mt19937 random(2);
  std::vector<Tensor> tensors;
  tensors.emplace_back(kFloat32, std::vector<std::int64_t>{3, 50}, random);
  tensors.emplace_back(kFloat64, std::vector<std::int64_t>{40, 2, 30}, random);
  tensors.emplace_back(kInt32, std::vector<std::int64_t>{7}, random);
  for (std::int64_t i = 0; i < 150; ++i) {
    const float value = 0.1f * i - 5;
    std::memcpy(tensors[0].at(i), &value, sizeof value);
  }
  for (std::int64_t i = 0; i < 2400; ++i) {
    const double value = 0.1 * i - 300;
    std::memcpy(tensors[1].at(i), &value, sizeof value);
  }
  const float scales[] = {2.0f, 0.5f, 9.0f};
  float largest[3] = {0.0f, 400.0f, 1.0f};
  std::int32_t nonfinite = 0;
  const Packer packer = packer_of(tensors);
  Buffer buffer(packer.nbytes());
  packer.pack(strided(tensors), buffer.strided(), {0.3, scales}, {largest, &nonfinite});
  CHECK_EQ(largest[0], 0.1f * 149 - 5);
  CHECK_EQ(largest[1], 400.0f);  // raised, never lowered
  CHECK_EQ(largest[2], 1.0f);
  CHECK_EQ(nonfinite, 0);
  const auto* floats = reinterpret_cast<const float*>(buffer.data());
  const auto* doubles = reinterpret_cast<const double*>(buffer.data() + packer.slots()[1].offset);
  const std::vector<Tensor> before = tensors;
  std::vector<Tensor> sums(tensors.begin(), tensors.end() - 1);
  const Packer adder = packer_of(sums);
  adder.unpack(strided(sums), buffer.strided(), {3.0, nullptr}, true);
  for (std::int64_t i = 0; i < 150; ++i) {
    float value, sum;
    std::memcpy(&value, tensors[0].at(i), sizeof value);
    std::memcpy(&sum, sums[0].at(i), sizeof sum);
    const float scaled = value * (0.3f * 2.0f), thrice = scaled * 3.0f;
    CHECK_EQ(floats[i], scaled);
    CHECK_EQ(sum, value + thrice);
  }
  for (std::int64_t i = 0; i < 2400; ++i) {
    double value, sum;
    std::memcpy(&value, tensors[1].at(i), sizeof value);
    std::memcpy(&sum, sums[1].at(i), sizeof sum);
    const double scaled = value * (0.3 * 0.5), thrice = scaled * 3.0;
    CHECK_EQ(doubles[i], scaled);
    CHECK_EQ(sum, value + thrice);
  }
  CHECK(std::memcmp(buffer.data() + packer.slots()[2].offset, tensors[2].at(0), 4) == 0);
}

TEST(threads_pack_different_messages_at_once) {
  const auto work = [](unsigned seed) {
    std::mt19937 random(seed);
    for (int round = 0; round < 20; ++round) {
      std::vector<Tensor> tensors = random_tensors(random, {kFloat32, kBfloat16});
      const Packer packer = packer_of(tensors, kFloat8E4m3fn);
      Buffer one(packer.nbytes()), two(packer.nbytes());
      packer.pack(strided(tensors), one.strided(), {}, {});
      packer.pack(strided(tensors), two.strided(), {}, {});
      CHECK(std::memcmp(one.data(), two.data(), packer.nbytes()) == 0);
    }
  };
  std::thread other(work, 3u);
  work(4u);
  other.join();
}

TEST(what_does_not_fit_is_refused_before_anything_is_written) {
  std::mt19937 random(5);
  std::vector<Tensor> tensors;
  tensors.emplace_back(kFloat32, std::vector<std::int64_t>{4, 8}, random);
  tensors.emplace_back(kInt32, std::vector<std::int64_t>{3}, random);
  const Packer packer = packer_of(tensors);
  Buffer buffer(packer.nbytes()), small(packer.nbytes() - 1);
  const auto given = strided(tensors);
  CHECK_THROWS(packer.pack(given, small.strided(), {}, {}), PackingError,
               "the buffer has 267 bytes; the layout needs 268");
  CHECK_THROWS(packer.check({given.data(), 1}), PackingError, "1 tensors; the layout has 2 slots");
  auto other = given;
  other[1].dtype = kUint8;
  CHECK_THROWS(packer.check(other), PackingError, "tensor 1 is uint8[3]; its slot is for int32[3]");
  CHECK_THROWS(packer.unpack(given, buffer.strided(), {}, true), PackingError,
               "tensor 1 is int32[3]; only floating-point types accumulate");
  CHECK(std::all_of(buffer.data(), buffer.data() + buffer.length,
                    [](std::byte byte) { return byte == kPoison; }));
  CHECK_THROWS(dtype_of("float4"), PackingError, "tensors of float4 cannot be packed");
}
