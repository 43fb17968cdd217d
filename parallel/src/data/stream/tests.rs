//! Micro-batches, gaps and faults, with one rank.

use std::borrow::Cow;

use super::*;
use crate::data::plan::Parameter;

fn ballot() -> Ballot {
    Ballot { finite: true, stop: false, busy: false, loss: 0.0, compute_s: 0.0, parameters: None, codec: None }
}

fn stream(bucket_bytes_max: usize) -> GradientStream {
    let parameter = |name: &str, n| Parameter { name: name.into(), shape: vec![n] };
    let plan = Plan::new(vec![parameter("a", 3), parameter("b", 2), parameter("c", 1)], bucket_bytes_max);
    GradientStream::new(Arc::new(plan.expect("small")))
}

#[test]
fn micro_batches_add_and_only_the_last_completes_a_bucket() {
    let stream = stream(12);
    stream.begin(7, 2);
    for micro_batch in 0..2 {
        stream.begin_micro_batch(micro_batch);
        assert_eq!(stream.complete(), [] as [usize; 0]);
        stream.add(2, Gradient::Host(&[1.0]));
        stream.add(1, Gradient::Host(&[2.0, 3.0]));
        assert_eq!(stream.complete(), if micro_batch == 1 { vec![0] } else { vec![] });
        stream.add(0, Gradient::Host(&[4.0, 5.0, 6.0]));
    }
    assert_eq!(stream.complete(), [0, 1]);
    let sum = stream.finish(ballot()).expect("no fault").sum;
    let found: Vec<Vec<f32>> = sum.parameters().map(Cow::into_owned).collect();
    assert_eq!(found, [vec![8.0, 10.0, 12.0], vec![4.0, 6.0], vec![2.0]]);
}

#[test]
fn a_parameter_without_a_gradient_has_zeros_and_no_trace_of_the_step_before() {
    let stream = stream(1 << 20);
    for step in 0..2 {
        stream.begin(step, 1);
        if step == 0 {
            stream.add(1, Gradient::Host(&[2.0, 3.0]));
        }
        let sum = stream.finish(ballot()).expect("no fault").sum;
        assert_eq!(*sum.parameter(1), if step == 0 { [2.0, 3.0] } else { [0.0, 0.0] });
    }
}

#[test]
fn a_wrong_size_and_a_second_gradient_are_named_and_the_next_step_is_clean() {
    let stream = stream(1 << 20);
    stream.begin(3, 1);
    stream.add(1, Gradient::Host(&[2.0]));
    let fault = stream.finish(ballot()).map(|_| ()).expect_err("one element of two");
    assert_eq!(fault, StreamError::Size { step: 3, parameter: "b".into(), expected: 2, found: 1 });
    stream.begin(4, 1);
    stream.add(2, Gradient::Host(&[2.0]));
    stream.add(2, Gradient::Host(&[2.0]));
    let fault = stream.finish(ballot()).map(|_| ()).expect_err("twice");
    assert_eq!(fault, StreamError::Twice { step: 4, parameter: "c".into(), micro_batch: 0 });
    stream.begin(5, 1);
    assert!(stream.finish(ballot()).is_ok());
}

#[test]
fn a_device_tensor_adds_like_a_host_slice() {
    let stream = stream(1 << 20);
    stream.begin(0, 1);
    let tensor = Tensor::<1>::from_floats([2.0, 3.0], &burn::tensor::Device::flex());
    stream.add(1, Gradient::Device(Box::new(tensor)));
    assert_eq!(*stream.finish(ballot()).expect("no fault").sum.parameter(1), [2.0, 3.0]);
}
