//! What a checkpoint needs of a [`LoraModel`].

use super::Checkpointable;
use crate::base::Fingerprint;
use crate::error::{Error, Result};
use crate::format::{peft, safetensors};
use crate::model::LoraModel;
use std::path::Path;
use tch::Device;

impl<M> Checkpointable for LoraModel<M> {
    fn adapter_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        self.adapter_bytes()
    }

    fn check_adapter(&self, folder: &Path) -> Result<()> {
        let recorded = peft::read_config(folder)?.config;
        let differences = recorded.differences(self.config());
        if !differences.is_empty() {
            return Err(Error::DifferentConfig { what: "LoRA configuration".into(), differences });
        }
        let path = folder.join(peft::WEIGHTS_FILE);
        self.check_tensors(&path, &safetensors::read(&path)?)
    }

    fn load_adapter(&mut self, folder: &Path) -> Result<()> {
        self.check_adapter(folder)?;
        let path = folder.join(peft::WEIGHTS_FILE);
        self.load_tensors(&path, safetensors::read(&path)?)?;
        Ok(())
    }

    fn fingerprint(&self) -> Result<Fingerprint> {
        self.base().fingerprint()
    }

    fn devices(&self) -> Vec<Device> {
        let mut devices = vec![Device::Cpu];
        for parameter in self.parameters() {
            let device = parameter.tensor.device();
            if !devices.contains(&device) {
                devices.push(device);
            }
        }
        devices
    }
}
