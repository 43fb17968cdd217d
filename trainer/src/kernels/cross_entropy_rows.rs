//! Cross entropy where a vocabulary's rows are in several places: the logits are never put together. Of each token all places
//! need the largest logit, the sum of the exponentials and the logit of the target, and these are what travels (Shoeybi et
//! al. 2019, section 3). Shapes: N tokens, V rows that are here.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use burn::Tensor;
use burn::tensor::Int;
use parallel::tap::{fused, through};
use rayon::prelude::*;

use super::cross_entropy::exponentials;
use super::{on_host, rows_a_piece, tensor, values};

/// Reduces numbers over all places, in place.
pub type Reduce = Arc<dyn Fn(&mut [f32]) + Send + Sync>;

/// The rows of a vocabulary that are here, and the way to those who have the others.
#[derive(Clone)]
pub struct SomeRows {
    /// Which.
    pub rows: Range<usize>,
    /// Gives all places the largest number of each.
    pub largest: Reduce,
    /// Gives all places the sum of each.
    pub sum: Reduce,
}

impl fmt::Debug for SomeRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SomeRows").field("rows", &self.rows).finish_non_exhaustive()
    }
}

/// As [`cross_entropy`](super::cross_entropy::cross_entropy) of all rows, of the logits `[N, V]` of those that are here: every
/// place has the whole loss, and the gradient of its own logits.
#[must_use]
pub fn cross_entropy_of_some(logits_nv: Tensor<2>, targets_n: Tensor<1, Int>, some: &SomeRows) -> Tensor<1> {
    let device = logits_nv.device();
    if !on_host(&device) {
        return reference(logits_nv, targets_n, some);
    }
    let rows = some.rows.clone();
    // The target's place among the rows that are here.
    let place = |id: i64| usize::try_from(id).ok().filter(|id| rows.contains(id)).map(|id| id - rows.start);
    let targets: Arc<Vec<Option<usize>>> = Arc::new(targets_n.into_data().iter::<i64>().map(place).collect());
    let some = some.clone();
    fused(logits_nv, move |logits_nv| {
        let (shape, device) = (logits_nv.dims(), logits_nv.device());
        let mut rows = values(logits_nv);
        // From here on `rows` holds exp(logit - largest), and `sums` their sums over all places.
        let (loss, sums) = forward(&mut rows, &targets, shape[1], &some);
        let (rows, targets) = (Arc::new(rows), targets.clone());
        let backward = move |gradient: Tensor<1>| {
            let device = gradient.device();
            let scale = values(gradient)[0];
            tensor(backward(&rows, &sums, &targets, scale), shape, &device)
        };
        (tensor(vec![loss], [1], &device), backward)
    })
}

fn forward(rows: &mut [f32], targets: &[Option<usize>], width: usize, some: &SomeRows) -> (f32, Vec<f32>) {
    let (piece, count) = (rows_a_piece(width), targets.len());
    let largest = |row: &[f32]| row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut largest: Vec<f32> = rows.par_chunks(width).with_min_len(piece).map(largest).collect();
    (some.largest)(&mut largest);
    let each = |((row, &target), &largest): ((&mut [f32], &Option<usize>), &f32)| {
        let chosen = target.map_or(0.0, |target| row[target]);
        (exponentials(row, largest), chosen)
    };
    let found = rows.par_chunks_mut(width).with_min_len(piece).zip(targets.par_iter()).zip(largest.par_iter());
    let (mut sums, chosen): (Vec<f32>, Vec<f32>) = found.map(each).unzip();
    sums.extend(chosen);
    (some.sum)(&mut sums);
    let chosen = sums.split_off(count);
    let of = |((sum, chosen), largest): ((&f32, f32), f32)| {
        libm::log(f64::from(*sum)) + f64::from(largest) - f64::from(chosen)
    };
    let loss: f64 = sums.iter().zip(chosen).zip(largest).map(of).sum();
    (loss as f32, sums)
}

fn backward(rows: &[f32], sums: &[f32], targets: &[Option<usize>], scale: f32) -> Vec<f32> {
    let width = rows.len() / targets.len().max(1);
    let mut out = vec![0.0; rows.len()];
    out.par_chunks_mut(width.max(1))
        .with_min_len(rows_a_piece(width))
        .zip(rows.par_chunks(width.max(1)))
        .zip(sums.par_iter().zip(targets))
        .for_each(|((out, row), (sum, &target))| {
            let factor = scale / sum;
            for (out, x) in out.iter_mut().zip(row) {
                *out = x * factor;
            }
            if let Some(target) = target {
                out[target] -= scale;
            }
        });
    out
}

/// The same in burn's operations, but for what travels.
#[must_use]
pub fn reference(logits_nv: Tensor<2>, targets_n: Tensor<1, Int>, some: &SomeRows) -> Tensor<1> {
    let ([n, v], first) = (logits_nv.dims(), some.rows.start as i64);
    let largest_n1 = everywhere(logits_nv.clone().detach().max_dim(1), &some.largest);
    let sum_n1 = everywhere((logits_nv.clone() - largest_n1.clone().expand([n, v])).exp().sum_dim(1), &some.sum);
    let absent_n =
        targets_n.clone().lower_elem(first).bool_or(targets_n.clone().greater_equal_elem(some.rows.end as i64));
    let place_n1 = targets_n.sub_scalar(first).mask_fill(absent_n.clone(), 0).reshape([n, 1]);
    let own_n1 = logits_nv.gather(1, place_n1).mask_fill(absent_n.reshape([n, 1]), 0.0);
    (sum_n1.log() + largest_n1 - everywhere(own_n1, &some.sum)).sum()
}

/// What all places have of it, whose gradient each place has too.
fn everywhere(x_n1: Tensor<2>, reduce: &Reduce) -> Tensor<2> {
    let reduce = reduce.clone();
    let forward = move |x: Tensor<2>| {
        let (shape, device) = (x.dims(), x.device());
        let mut numbers = values(x);
        reduce(&mut numbers);
        tensor(numbers, shape, &device)
    };
    through(x_n1, forward, |gradient| gradient)
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, Mutex};

    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::kernels::cross_entropy::{cross_entropy, targets};
    use crate::kernels::tests::{numbers, same};

    /// Places as threads: each adds what it has, and all read the result.
    struct Places {
        barrier: Barrier,
        numbers: Mutex<Vec<Vec<f32>>>,
    }

    fn places(count: usize) -> Arc<Places> {
        Arc::new(Places { barrier: Barrier::new(count), numbers: Mutex::new(Vec::new()) })
    }

    impl Places {
        fn reduce(self: &Arc<Self>, with: fn(f32, f32) -> f32) -> Reduce {
            let places = self.clone();
            Arc::new(move |values| {
                places.numbers.lock().expect("no panic").push(values.to_vec());
                places.barrier.wait();
                let all = places.numbers.lock().expect("no panic").clone();
                places.barrier.wait();
                places.numbers.lock().expect("no panic").clear();
                places.barrier.wait();
                for (at, value) in values.iter_mut().enumerate() {
                    *value = all.iter().map(|one| one[at]).reduce(with).expect("one place at least");
                }
            })
        }

        fn some(self: &Arc<Self>, rows: Range<usize>) -> SomeRows {
            SomeRows { rows, largest: self.reduce(f32::max), sum: self.reduce(|a, b| a + b) }
        }
    }

    const IDS: [i32; 5] = [0, 36, 7, 7, 12];
    const V: usize = 37;

    fn logits(device: &Device) -> Vec<f32> {
        values(numbers([IDS.len(), V], 1, device).mul_scalar(5.0))
    }

    fn close(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * (1.0 + b.abs()))
    }

    /// The loss, and the gradient of these columns of the logits.
    fn run(columns: Range<usize>, loss: impl Fn(Tensor<2>, Tensor<1, Int>) -> Tensor<1>) -> (Vec<f32>, Vec<f32>) {
        let device = Device::flex().autodiff();
        let all = logits(&Device::flex());
        let own: Vec<f32> = all.chunks(V).flat_map(|row| row[columns.clone()].to_vec()).collect();
        let x = Tensor::<2>::from_data(TensorData::new(own, [IDS.len(), columns.len()]), &device).require_grad();
        let loss = loss(x.clone(), targets(&IDS, &device)).mul_scalar(0.5);
        let gradients = loss.backward();
        (values(loss.inner()), values(x.grad(&gradients).expect("an input")))
    }

    #[test]
    fn parts_have_the_loss_and_the_gradients_of_the_whole() {
        let (loss, gradient) = run(0..V, cross_entropy);
        for cuts in [vec![0, V], vec![0, 7, V], vec![0, 1, 20, V]] {
            for kernel in [true, false] {
                let places = places(cuts.len() - 1);
                let part = |rows: Range<usize>| {
                    let some = places.some(rows.clone());
                    run(
                        rows,
                        |x, ids| if kernel { cross_entropy_of_some(x, ids, &some) } else { reference(x, ids, &some) },
                    )
                };
                let found: Vec<_> = std::thread::scope(|scope| {
                    let part = &part;
                    let threads: Vec<_> = cuts
                        .windows(2)
                        .map(|pair| (pair[0], pair[1]))
                        .map(|(from, to)| scope.spawn(move || part(from..to)))
                        .collect();
                    threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
                });
                for ((found_loss, found_gradient), pair) in found.iter().zip(cuts.windows(2)) {
                    let expected: Vec<f32> =
                        gradient.chunks(V).flat_map(|row| row[pair[0]..pair[1]].to_vec()).collect();
                    assert!(close(found_loss, &loss) && close(found_gradient, &expected), "{cuts:?}, kernel {kernel}");
                }
            }
        }
    }

    #[test]
    fn of_all_rows_it_equals_its_reference() {
        let device = Device::flex().autodiff();
        let nothing: Reduce = Arc::new(|_| ());
        let some = SomeRows { rows: 0..V, largest: nothing.clone(), sum: nothing };
        let ids = targets(&IDS, &device);
        let x = numbers([IDS.len(), V], 1, &device).mul_scalar(5.0);
        same(
            &[x],
            |x| cross_entropy_of_some(x[0].clone(), ids.clone(), &some),
            |x| reference(x[0].clone(), ids.clone(), &some),
        );
    }

    #[test]
    fn a_nan_in_one_part_shows_in_the_loss() {
        let device = Device::flex();
        let nothing: Reduce = Arc::new(|_| ());
        let some = SomeRows { rows: 0..3, largest: nothing.clone(), sum: nothing };
        let loss =
            cross_entropy_of_some(tensor(vec![0.0, f32::NAN, 1.0], [1, 3], &device), targets(&[0], &device), &some);
        assert!(values(loss)[0].is_nan());
    }
}
