//! How a tensor's tokens lie when they are cut between N members. A member's part is `[B, T / N, D]`; what a collective operation
//! takes and gives has the members outermost, `[N, B, T / N, D]`, and a model wants `[B, T, D]`.

use burn::Tensor;

/// `[B, T, D]` to what the operation takes, in as many dimensions: `[N * B, T / N, D]`.
pub fn cut(x_btd: Tensor<3>, n: usize) -> Tensor<3> {
    let [b, t, d] = x_btd.dims();
    x_btd.reshape([b, n, t / n, d]).swap_dims(0, 1).reshape([n * b, t / n, d])
}

/// The inverse: `[N * B, T / N, D]` to `[B, T, D]`.
pub fn join(x: Tensor<3>, n: usize) -> Tensor<3> {
    let [nb, part, d] = x.dims();
    x.reshape([n, nb / n, part, d]).swap_dims(0, 1).reshape([nb / n, n * part, d])
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    #[test]
    fn members_are_outermost_and_come_back() {
        let numbers = |n: usize| (0..n).map(|i| i as f32).collect::<Vec<_>>();
        let x = Tensor::<3>::from_data(TensorData::new(numbers(8), [2, 4, 1]), &Device::flex());
        let parts = cut(x.clone(), 2).into_data().try_into_vec::<f32>().expect("f32");
        // Of both sequences the first two tokens, and then the last two.
        assert_eq!(parts, [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]);
        assert_eq!(join(cut(x.clone(), 2), 2).into_data(), x.into_data());
    }
}
