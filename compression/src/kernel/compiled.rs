//! The kernels compiled with a level's instructions: one copy for each way to write a block.

use super::{Stores, avx2, avx512, blocks, simple};
use crate::codec::layout::{Format, Planes, PlanesMut};
use crate::codec::{Codec, Found, payload};

macro_rules! compiled_with {
    ($name:ident, $simd:ty, $features:literal) => {
        pub(super) mod $name {
            use super::*;
            use crate::codec::layout::Width::{Eight, Four};

            macro_rules! for_each_format {
                ($format:expr, |$f:ident| $body:expr) => {
                    match $format {
                        Format { width: Eight, sparse: false } => {
                            const $f: Format = Format { width: Eight, sparse: false };
                            $body
                        }
                        Format { width: Four, sparse: false } => {
                            const $f: Format = Format { width: Four, sparse: false };
                            $body
                        }
                        Format { width: Eight, sparse: true } => {
                            const $f: Format = Format { width: Eight, sparse: true };
                            $body
                        }
                        Format { width: Four, sparse: true } => {
                            const $f: Format = Format { width: Four, sparse: true };
                            $body
                        }
                    }
                };
            }

            #[target_feature(enable = $features)]
            pub(in crate::kernel) fn encode(
                codec: Codec,
                format: Option<Format>,
                stores: Stores,
                values: &mut [f32],
                residual: &[f32],
                mut out: PlanesMut<'_>,
            ) -> Found {
                match format {
                    None => simple::encode(codec, values, residual, out.values),
                    // SAFETY: this function is compiled with the instructions.
                    Some(format) => for_each_format!(format, |F| unsafe {
                        blocks::encode::<$simd>(F, stores, values, residual, &mut out)
                    }),
                }
            }

            #[target_feature(enable = $features)]
            pub(in crate::kernel) fn fault(
                codec: Codec,
                planes: Planes<'_>,
                elements: usize,
            ) -> Option<(usize, &'static str)> {
                // Known where it is inlined, so that each codec has a loop of its own.
                match codec {
                    Codec::Fp32 => payload::first_fault(Codec::Fp32, planes, elements),
                    Codec::Bf16 => payload::first_fault(Codec::Bf16, planes, elements),
                    Codec::Int8 => payload::first_fault(Codec::Int8, planes, elements),
                    Codec::Int4 => payload::first_fault(Codec::Int4, planes, elements),
                    Codec::Sparse24Int8 => payload::first_fault(Codec::Sparse24Int8, planes, elements),
                    Codec::Sparse24Int4 => payload::first_fault(Codec::Sparse24Int4, planes, elements),
                }
            }

            #[target_feature(enable = $features)]
            pub(in crate::kernel) fn decode(
                codec: Codec,
                format: Option<Format>,
                stores: Stores,
                planes: Planes<'_>,
                out: &mut [f32],
            ) {
                match format {
                    None => simple::decode(codec, planes.values, out),
                    Some(format) => for_each_format!(format, |F| {
                        // SAFETY: as above.
                        unsafe { blocks::decode::<$simd>(F, stores, planes, out) }
                    }),
                }
            }

            #[target_feature(enable = $features)]
            pub(in crate::kernel) fn decode_add(
                codec: Codec,
                format: Option<Format>,
                planes: Planes<'_>,
                sum: &mut [f32],
            ) {
                match format {
                    None => simple::decode_add(codec, planes.values, sum),
                    Some(format) => for_each_format!(format, |F| {
                        // SAFETY: as above.
                        unsafe { blocks::decode_add::<$simd>(F, planes, sum) }
                    }),
                }
            }
        }
    };
}

compiled_with!(on_avx2, avx2::Avx2, "avx2,fma,bmi1,bmi2,popcnt,lzcnt");
compiled_with!(
    on_avx512,
    avx512::Avx512,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,fma,bmi1,bmi2,popcnt,lzcnt"
);
