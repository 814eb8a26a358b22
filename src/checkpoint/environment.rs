//! Where and with what a checkpoint was made.

use crate::error::Result;
use crate::ffi::runtime::{Float32MatmulPrecision, float32_matmul_precision};
use crate::train::compare::differences;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use tch::Device;

/// Settings of libtorch and its libraries, outside of its API, that change results.
const VARIABLES: [&str; 5] =
    ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"];

/// What `environment.json` holds. Nothing of it is brought back by a resume:
/// what differs is warned of, since the same numbers are promised only where
/// machine, libraries and threads are the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Environment {
    tch_peft: String,
    tch: String,
    libtorch: String,
    os: String,
    arch: String,
    cpu: Option<String>,
    threads: i32,
    interop_threads: i32,
    devices: Vec<String>,
    cudnn: Option<i64>,
    /// Not recorded from the beginning.
    #[serde(default = "highest")]
    float32_matmul_precision: String,
    variables: BTreeMap<String, String>,
    /// The run's settings, for people: resume reads them from elsewhere.
    configuration: Value,
}

impl Environment {
    pub(super) fn capture(devices: &[Device], configuration: Value) -> Result<Self> {
        let set = |name: &&str| Some((name.to_string(), std::env::var(name).ok()?));
        let devices = devices.iter().map(|&device| crate::train::device_name(device));
        Ok(Environment {
            tch_peft: env!("CARGO_PKG_VERSION").into(),
            // torch-sys refuses to build against another libtorch.
            tch: "0.24".into(),
            libtorch: "2.11".into(),
            os: std::env::consts::OS.into(),
            arch: std::env::consts::ARCH.into(),
            cpu: cpu_model(),
            threads: tch::get_num_threads(),
            interop_threads: tch::get_num_interop_threads(),
            devices: devices.collect::<Result<_>>()?,
            cudnn: tch::Cuda::cudnn_is_available().then(tch::utils::version_cudnn),
            float32_matmul_precision: float32_matmul_precision()?.name().into(),
            variables: VARIABLES.iter().filter_map(set).collect(),
            configuration,
        })
    }

    /// One line for each thing, the configuration aside, that is no longer as
    /// it was recorded.
    pub(super) fn differences(&self, now: &Environment) -> Vec<String> {
        let machine = |environment: &Environment| {
            let environment = Environment { configuration: Value::Null, ..environment.clone() };
            // Plain data; it has no value that JSON can't hold.
            serde_json::to_value(environment).unwrap_or_default()
        };
        differences(&machine(self), &machine(now))
    }
}

fn highest() -> String {
    Float32MatmulPrecision::Highest.name().into()
}

/// The processor's name, where the system tells it in a file.
fn cpu_model() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn differences_leave_the_configuration_out() {
        let recorded = Environment::capture(&[Device::Cpu], json!({"every": 1})).unwrap();
        let mut now = Environment { configuration: json!({"every": 2}), ..recorded.clone() };
        assert!(recorded.differences(&now).is_empty());
        now.threads = recorded.threads + 1;
        let line = format!("threads: recorded {}, given {}", recorded.threads, now.threads);
        assert_eq!(recorded.differences(&now), [line]);
        now.threads = recorded.threads;
        now.float32_matmul_precision = "medium".into();
        let line = r#"float32_matmul_precision: recorded "highest", given "medium""#;
        assert_eq!(recorded.differences(&now), [line]);
    }
}
