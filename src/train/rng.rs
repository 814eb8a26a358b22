//! The state of libtorch's default random generators.

use crate::error::{Error, Result};
use crate::ffi::generator;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use tch::Device;

/// The states of the default generators of some devices, the CPU always among
/// them: what dropout, initialisation and `randn` draw from.
///
/// Serialises to an object of device names (`cpu`, `cuda:0`) and hex text.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_peft::RngState;
///
/// let draw = || Tensor::rand([3], (Kind::Float, Device::Cpu));
/// let state = RngState::capture(&[])?; // of the CPU's generator; devices besides it are listed
/// let first = draw();
/// state.restore()?;
/// assert!(draw().equal(&first));
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "BTreeMap<String, String>", try_from = "BTreeMap<String, String>")]
pub struct RngState {
    /// By device name, so that files come out the same each time.
    states: BTreeMap<String, (Device, Vec<u8>)>,
}

impl RngState {
    /// Reads the states of the CPU's generator and those of `devices`.
    ///
    /// # Errors
    /// A device that is neither CPU nor CUDA, or is not there.
    pub fn capture(devices: &[Device]) -> Result<Self> {
        let state = |&device: &Device| Ok((device_name(device)?, (device, generator::get_state(device)?)));
        let states = [Device::Cpu].iter().chain(devices).map(state).collect::<Result<_>>()?;
        Ok(RngState { states })
    }

    /// Tells whether the states are those of the CPU and `devices`, no fewer
    /// and no more, and of this libtorch's generators.
    ///
    /// # Errors
    /// [`Error::DifferentConfig`], or a device that is not there.
    pub fn check(&self, devices: &[Device]) -> Result<()> {
        let here = RngState::capture(devices)?;
        let sizes = |states: &RngState| -> BTreeMap<String, usize> {
            states.states.iter().map(|(name, (_, state))| (name.clone(), state.len())).collect()
        };
        let show = |sizes: &BTreeMap<String, usize>| -> String {
            let list: Vec<_> = sizes.iter().map(|(name, size)| format!("{name} ({size} bytes)")).collect();
            list.join(", ")
        };
        let (recorded, given) = (sizes(self), sizes(&here));
        if recorded == given {
            return Ok(());
        }
        let line = format!("generators: recorded {}, given {}", show(&recorded), show(&given));
        Err(Error::DifferentConfig { what: "devices".into(), differences: vec![line] })
    }

    /// Those of the CPU and of `devices`.
    pub(crate) fn on(&self, devices: &[Device]) -> Self {
        let wanted = |device: &Device| *device == Device::Cpu || devices.contains(device);
        let states = self.states.iter().filter(|(_, (device, _))| wanted(device));
        RngState { states: states.map(|(name, state)| (name.clone(), state.clone())).collect() }
    }

    /// The devices that these are the states of.
    pub(crate) fn devices(&self) -> Vec<Device> {
        self.states.values().map(|(device, _)| *device).collect()
    }

    /// Sets the generators to these states.
    ///
    /// # Errors
    /// A device that is not there, or a state that its generator refuses.
    pub fn restore(&self) -> Result<()> {
        self.states.values().try_for_each(|(device, state)| generator::set_state(*device, state))
    }
}

/// `cpu` or `cuda:0`.
pub(crate) fn device_name(device: Device) -> Result<String> {
    match device {
        Device::Cpu => Ok("cpu".into()),
        Device::Cuda(index) => Ok(format!("cuda:{index}")),
        other => Err(Error::config("device", "Cpu or Cuda", format!("{other:?}"))),
    }
}

fn device_of(name: &str) -> Option<Device> {
    match name.strip_prefix("cuda:") {
        Some(index) => index.parse().ok().map(Device::Cuda),
        None => (name == "cpu").then_some(Device::Cpu),
    }
}

impl From<RngState> for BTreeMap<String, String> {
    fn from(rng: RngState) -> Self {
        rng.states.into_iter().map(|(name, (_, state))| (name, to_hex(&state))).collect()
    }
}

impl TryFrom<BTreeMap<String, String>> for RngState {
    type Error = String;

    fn try_from(texts: BTreeMap<String, String>) -> Result<Self, String> {
        let read = |(name, text): (String, String)| {
            let device = device_of(&name).ok_or_else(|| format!("unknown device `{name}`"))?;
            let state = from_hex(&text).ok_or_else(|| format!("the state of `{name}` is not hex text"))?;
            Ok((name, (device, state)))
        };
        Ok(RngState { states: texts.into_iter().map(read).collect::<Result<_, String>>()? })
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let byte = |pair: &[u8]| match pair {
        [high, low] => u8::try_from(digit(*high)? * 16 + digit(*low)?).ok(),
        _ => None,
    };
    text.as_bytes().chunks(2).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trips() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)), Some(bytes));
        assert_eq!(from_hex("0g"), None);
        assert_eq!(from_hex("012"), None);
    }

    #[test]
    fn other_devices_are_refused() {
        let text = |names: &str| serde_json::from_str::<RngState>(names);
        assert!(text(r#"{"cpu": "00", "tpu": "00"}"#).is_err());
        let short = text(r#"{"cpu": "00"}"#).unwrap();
        assert!(matches!(short.check(&[]), Err(Error::DifferentConfig { .. })));
        let both = text(r#"{"cpu": "00", "cuda:1": "00"}"#).unwrap();
        let message = both.check(&[Device::Cpu]).unwrap_err().to_string();
        assert!(message.contains("recorded cpu (1 bytes), cuda:1 (1 bytes), given cpu (5056 bytes)"), "{message}");
    }
}
