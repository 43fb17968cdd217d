//! The codecs by name.
//!
//! With one rank nothing is sent, so the only member that exists yet is `fp32`; `bf16` and `int8` arrive together with
//! the second process.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How the elements of a tensor become bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Codec {
    /// 32 bits an element, little-endian: the reference that every other codec is compared with.
    #[serde(rename = "fp32")]
    Fp32,
}

impl Codec {
    /// Every codec of this build, in the order in which a user should read them.
    pub const ALL: [Self; 1] = [Self::Fp32];

    /// The name that recipes, metrics and frames use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
        }
    }

    /// The codec of that name, or `None`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.name() == name)
    }

    /// Bytes of the payload of `elements` elements, framing not counted.
    #[must_use]
    pub const fn payload_bytes(self, elements: usize) -> usize {
        match self {
            Self::Fp32 => 4 * elements,
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_back_to_its_codec_and_no_other_name_does() {
        for codec in Codec::ALL {
            assert_eq!(Codec::from_name(codec.name()), Some(codec));
        }
        assert_eq!(Codec::from_name("FP32"), None);
        assert_eq!(Codec::from_name("int9"), None);
    }
}
