//! What a handler has done for it.

use async_trait::async_trait;

use super::facade::Refusal;
use super::failure::Failure;
use super::plan::Left;
use crate::journal::StoredVolume;
use crate::spec::{RemoveOptions, VolumeSpec};
use crate::types::VolumeName;

/// What the handler has done for it: the way of an attach and back.
#[async_trait]
pub trait Steps: Send + Sync + 'static {
    /// Checks an addition against the pod and the domain; changes nothing.
    async fn check_add(&self, spec: &VolumeSpec) -> Result<(), Refusal>;

    /// Checks a removal against the domain and the guest; changes nothing. `known` is `None` for a
    /// name that the handler does not know: the refusal then says what is in the domain. Returns what
    /// would be given up by it, in words: what it would be refused for if it were not forced.
    async fn check_remove(
        &self,
        name: &VolumeName,
        known: Option<&VolumeSpec>,
        options: RemoveOptions,
    ) -> Result<Vec<String>, Refusal>;

    /// Goes the whole way, or finds it gone; on failure all is undone, unless there is something
    /// [`Left`].
    async fn attach(&self, volume: &StoredVolume) -> Result<(), AttachFailure>;

    /// Returns when the VM may have gone or come back, so that its volumes have to be looked at.
    async fn vm_changed(&self);

    /// Goes the whole way back, from wherever an attach came to.
    async fn detach(&self, volume: &VolumeSpec, options: RemoveOptions) -> Result<(), Failure>;
}

/// An attach that did not succeed.
#[derive(Debug)]
pub struct AttachFailure {
    /// Why.
    pub failure: Failure,
    /// What is there of it.
    pub left: Left,
}
