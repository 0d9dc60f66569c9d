// What CuTe makes of the tiles of csrc/attention/sm90.cuh, in hopper_layouts.cpp's words.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cstdio>
#include <cute/tensor.hpp>

namespace {

using namespace cute;
using Element = bfloat16_t;
using SM90::GMMA::Major;

constexpr int kRows = 128;

template <class Layout>
void print_places(const char* name, int span, const Layout& layout) {
  std::printf("%s %d", name, span);
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < 72; ++column) std::printf(" %d", int(layout(row, column)) * 2);
  }
  std::printf("\n");
}

// Descriptors of one operand, by steps of its contraction.
template <class Fragments>
void print_descriptors(const char* name, int span, const Fragments& fragments) {
  std::printf("%s %d", name, span);
  for (int step = 0; step < size<2>(fragments); ++step) {
    for (int i = 0; i < size<1>(fragments); ++i) {
      const GmmaDescriptor descriptor = fragments(0, i, step);
      std::printf(" %llx", static_cast<unsigned long long>(uint64_t(descriptor.desc_)));
    }
  }
  std::printf("\n");
}

// kColumns: those of whole panels.
template <int kColumns, class ColumnsAtom, class RowsAtom>
void print(int span, ColumnsAtom columns_atom, RowsAtom rows_atom) {
  alignas(1024) static Element bytes[kRows * kColumns];
  const auto contract_columns = tile_to_shape(columns_atom, Shape<Int<kRows>, Int<kColumns>>{});
  // as (column, row); a panel's rows before the next panel
  const auto contract_rows =
      tile_to_shape(rows_atom, Shape<Int<kColumns>, Int<kRows>>{}, Step<_2, _1>{});
  const auto swizzled_columns = as_position_independent_swizzle_layout(contract_columns);
  const auto swizzled_rows = as_position_independent_swizzle_layout(contract_rows);
  print_places("columns_of", span, swizzled_columns);
  print_places("rows_of", span, [&](int row, int column) { return swizzled_rows(column, row); });

  const auto scores = make_tiled_mma(SM90_64x128x16_F32BF16BF16_SS<Major::K, Major::K>{});
  const auto tile = make_tensor(make_smem_ptr(bytes), contract_columns);
  const auto thread = scores.get_thread_slice(0);
  print_descriptors("columns_a", span, thread.make_fragment_A(thread.partition_A(tile)));
  print_descriptors("columns_b", span, thread.make_fragment_B(thread.partition_B(tile)));

  using Out = MMA_Atom<decltype([] {
    if constexpr (kColumns == 128) return SM90_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>{};
    if constexpr (kColumns == 96) return SM90_64x96x16_F32BF16BF16_RS<Major::K, Major::MN>{};
    if constexpr (kColumns == 80) return SM90_64x80x16_F32BF16BF16_RS<Major::K, Major::MN>{};
  }())>;
  const auto values = make_tensor(make_smem_ptr(bytes), contract_rows);
  const auto other = make_tiled_mma(Out{}).get_thread_slice(0);
  print_descriptors("rows_b", span, other.make_fragment_B(other.partition_B(values)));
}

// Elements of [64, 72] that a thread holds as accumulators, and of [64, 16] as an operand.
void print_registers() {
  const auto mma = make_tiled_mma(SM90_64x72x16_F32BF16BF16_RS<Major::K, Major::MN>{});
  const auto print = [](const char* name, const auto& part_of) {
    std::printf("%s 0", name);
    for (int thread = 0; thread < 128; ++thread) {
      const auto part = part_of(thread);
      for (int i = 0; i < size(part); ++i) {
        std::printf(" %d", int(get<0>(part(i))) * 72 + int(get<1>(part(i))));
      }
    }
    std::printf("\n");
  };
  print("accumulators", [&](int thread) {
    return mma.get_thread_slice(thread).partition_C(make_identity_tensor(Shape<_64, _72>{}));
  });
  print("operand", [&](int thread) {
    return mma.get_thread_slice(thread).partition_A(make_identity_tensor(Shape<_64, _16>{}));
  });
}

}  // namespace

int main() {
  using namespace SM90::GMMA;
  print<128>(128, Layout_K_SW128_Atom<Element>{}, Layout_MN_SW128_Atom<Element>{});
  print<96>(64, Layout_K_SW64_Atom<Element>{}, Layout_MN_SW64_Atom<Element>{});
  print<80>(32, Layout_K_SW32_Atom<Element>{}, Layout_MN_SW32_Atom<Element>{});
  print_registers();
}
