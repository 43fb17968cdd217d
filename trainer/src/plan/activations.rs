//! What the backward pass needs of the forward pass, and what comes on top of it at the peak. Elements of f32.
//!
//! Found by looking at all large blocks that were alive at the peak of steps whose sizes were all different, on `flex`,
//! with this repository's kernels. For a micro-batch of N tokens, width D, H heads on sequences of T tokens, feed-forward
//! width F and vocabulary V a layer keeps
//!
//! ```text
//! 8 N D      the input of both norms (each a copy) and their output; queries, keys and values as they are multiplied
//!            (of fewer key-value heads the repeated ones); the input of the output projection
//! 2 N H T    the weights of attention twice: the softmax keeps its own copy of what the product keeps
//! 3 N F      gate and up, which SwiGLU keeps, and its output
//! ```
//!
//! and the head `2 N D + N V`: the last norm, and the exponentials of the logits. What comes on top while the backward
//! pass goes through the head and the last layer, where everything else is still alive, is in [`transient`].

use super::part::Part;

/// Elements that one micro-batch keeps, of `layers` layers and, where `head` says so, of the head.
#[must_use]
pub fn kept(part: &Part, rows: usize, seq_len: usize, layers: usize, head: bool) -> usize {
    let Sizes { nd, own_nd, nf, nht, nv, n, d, .. } = sizes(part, rows, seq_len);
    // The inverse roots of both norms, and copies of their gains.
    let layer = 4 * nd + 4 * own_nd + 2 * nht + 3 * nf + 2 * (n + d);
    layers * layer + if head { 2 * nd + nv + 2 * n + d } else { 0 }
}

/// Elements that come on top of what is [`kept`] at the peak, when the backward pass has begun; what was freed by then
/// is taken off.
#[must_use]
pub fn transient(part: &Part, rows: usize, seq_len: usize) -> isize {
    let Sizes { nd, own_nd, nf, nht, nv, df, vd, .. } = sizes(part, rows, seq_len);
    let tied = part.config.tie_word_embeddings;
    let [nd, own_nd, nf, nht, nv, df, vd] = [nd, own_nd, nf, nht, nv, df, vd].map(|x| x as isize);
    // The table's gradient from the head waits for that from the embedding.
    let waits = if tied && part.is_last() { vd } else { 0 };
    // When the last layer's turn comes the head's part is gone.
    let freed = if part.is_last() { 2 * nd + nv } else { 0 };
    let mut moments = Vec::new();
    if part.is_last() {
        // The logits beside their exponentials, at the end of the forward pass and at the begin of the backward pass.
        moments.push(nv);
        // The product's two gradients, of which that of the weight is turned over.
        moments.push(nd + 2 * vd);
    }
    // Of the last layer: the projection down; SwiGLU; the projections up, of which the first one's weight has its gradient
    // when the second one's turn comes; attention.
    moments.push(waits - freed + nd + nf + 2 * df);
    moments.push(waits - freed + nd + 2 * nf);
    moments.push(waits - freed + 3 * nd - 2 * nf + 3 * df);
    moments.push(waits - freed - own_nd - 3 * nf + 2 * nht);
    if part.is_first() {
        // At the end nothing is kept any more. A tied table has both its gradients and their sum.
        let all = kept(part, rows, seq_len, part.layer_count(), part.is_last()) as isize;
        moments.push(nd + if waits > 0 { 3 } else { 2 } * vd - all);
    }
    moments.into_iter().max().unwrap_or(0)
}

struct Sizes {
    n: usize,
    d: usize,
    nd: usize,
    own_nd: usize,
    nf: usize,
    nht: usize,
    nv: usize,
    df: usize,
    vd: usize,
}

fn sizes(part: &Part, rows: usize, seq_len: usize) -> Sizes {
    let (n, d) = (rows * seq_len, part.config.hidden_size);
    Sizes {
        n,
        d,
        nd: n * d,
        own_nd: n * part.heads * part.config.head_dim(),
        nf: n * part.feed_forward,
        nht: n * part.heads * seq_len,
        nv: n * part.vocabulary,
        df: d * part.feed_forward,
        vd: part.vocabulary * d,
    }
}
