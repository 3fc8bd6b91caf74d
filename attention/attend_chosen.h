// Quest's whole layer in one launch, where a few clusters of blocks fill a GPU: pages scored, chosen and attended to.
// What it does is choose_pages, then attend_selected with a split for each block of a cluster, then count_selected: the
// same lists, the same bits of every output. Also the choice alone, for those who attend to a part of it.
#pragma once

#include "attention/attend_selected.h"
#include "attention/select_pages.h"

namespace vesper::cuda {

// Blocks of the cluster that serves one list: of the page bounds and the list's pages each reads its share. 1 where the
// two launches serve better, or where the device has no clusters.
//   pages  most pages of a sequence;  entries  most of a list
int chosen_cluster(const AttentionShape& shape, int seqs, int pages, int entries);

// For `cluster` (over 1) blocks a list, of sequences over `dense`.
//   page_score     by bounds, exact or in 8 bits
//   pages          as select_pages leaves them
//   q, out, lse    as in attend_selected
//   min_entries    of a block's part of a list
//   counters       added to where they have data
void attend_chosen(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                   const Batch& batch, PageScore page_score, GroupScore group_score, const PageBudget& budget,
                   DenseLimit dense, int cluster, int min_entries, const Selection& pages, const TensorRef& out,
                   TensorView<float, 2> lse, const KeptCounters& counters);

// The same for choose_in_clusters, which makes the lists of choose_pages without leaving scores.
int choosing_cluster(const AttentionShape& shape, int seqs, int pages);
void choose_in_clusters(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                        const Batch& batch, PageScore page_score, GroupScore group_score, const PageBudget& budget,
                        DenseLimit dense, int cluster, const Selection& pages);

}  // namespace vesper::cuda
