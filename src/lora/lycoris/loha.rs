//! LoHa: ΔW = s · (A₁·B₁) ⊙ (A₂·B₂) (FedPara, arXiv:2108.06098, proposition 1,
//! as LyCORIS, arXiv:2309.14859, uses it).
//!
//! With A (out, r) and B (r, in · kernel), ΔW has a rank of up to r². Where the
//! kernel of a convolution is decomposed too, each half is a Tucker
//! decomposition T ×₁ A ×₂ B with A (r, out), B (r, in) and T (r, r, kernel…).

use super::config::Loha;
use super::formula::{Formula, Method, Place, Start, tucker};
use crate::error::{Error, Result};
use std::sync::Arc;
use tch::Tensor;

#[derive(Debug)]
struct Hadamard {
    sizes: Vec<i64>,
}

impl Formula for Hadamard {
    fn weight(&self, tensors: &[Tensor], s: f64) -> Result<Tensor> {
        let product = match tensors {
            [a1, b1, a2, b2] => a1.f_mul_scalar(s)?.f_mm(b1)?.f_mul(&a2.f_mm(b2)?)?,
            [a1, b1, a2, b2, t1, t2] => tucker(t1, &a1.f_mul_scalar(s)?, b1)?.f_mul(&tucker(t2, a2, b2)?)?,
            _ => {
                let found = tensors.len().to_string();
                return Err(Error::Mismatch { name: "tensors of LoHa".into(), expected: "4 or 6".into(), found });
            }
        };
        Ok(product.f_reshape(self.sizes.as_slice())?)
    }
}

impl Method for Loha {
    fn start(&self, place: &Place) -> Result<Start> {
        let (r, [out, inn]) = (place.r, [place.sizes[0], place.sizes[1]]);
        let pointwise = place.kernel().iter().all(|&size| size == 1);
        let (a, b, core) = if place.effective && !pointwise {
            ([r, out], [r, inn], true)
        } else {
            ([out, r], [r, place.sizes[1..].iter().product()], false)
        };
        let mut tensors = vec![
            ("hada_w1_a", place.start(&a, false)?),
            ("hada_w1_b", place.start(&b, false)?),
            ("hada_w2_a", place.start(&a, false)?),
            ("hada_w2_b", place.start(&b, self.init_weights)?),
        ];
        if core {
            for name in ["hada_t1", "hada_t2"] {
                tensors.push((name, place.start(&place.core(), false)?));
            }
        }
        Ok(Start { formula: Arc::new(Hadamard { sizes: place.sizes.to_vec() }), tensors })
    }

    fn rescale(&self) -> bool {
        true
    }
}
