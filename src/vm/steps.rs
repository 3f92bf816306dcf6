//! What a handler has done for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::facade::Refusal;
use super::failure::Failure;
use super::plan::Left;
use super::plan::fc::Power;
use crate::connector::{Attachment, Paths, Touched};
use crate::journal::StoredVolume;
use crate::spec::{RemoveOptions, VolumeSpec};
use crate::types::{Outcome, VolumeName};

/// What the handler has done for it: the way of an attach and back.
#[async_trait]
pub trait Steps: Send + Sync + 'static {
    /// Checks an addition against the pod and the domain; changes nothing. Returns whether the VM runs. `leaving` are volumes whose removal
    /// is asked for with it.
    async fn check_add(
        &self,
        spec: &VolumeSpec,
        leaving: &BTreeSet<VolumeName>,
    ) -> Result<Power, Refusal>;

    /// Checks a removal against the domain and the guest; changes nothing. `known` is `None` for a
    /// name that the handler does not know: the refusal then says what is in the domain. Returns what
    /// would be given up by it, in words: what it would be refused for if it were not forced.
    async fn check_remove(
        &self,
        name: &VolumeName,
        known: Option<&VolumeSpec>,
        options: RemoveOptions,
    ) -> Result<Vec<String>, Refusal>;

    /// Goes the whole way, or finds it gone. On failure all is undone, unless there is something
    /// [`Left`].
    async fn attach(
        &self,
        volume: &StoredVolume,
        how: Circumstances,
    ) -> Result<Came, AttachFailure>;

    /// Has a ready volume follow its LUN, which has grown, or finds that it has; `expected` is the size
    /// that the LUN must have by now. Nothing is undone when it fails: asked again, it goes on.
    async fn expand(
        &self,
        volume: &StoredVolume,
        expected: Option<u64>,
    ) -> Result<Outcome<Grown>, ExpandFailure>;

    /// Gives the volume's disk its I/O limits, if the guest has it, or finds that it has them. Nothing is
    /// undone when it fails: asked again, it goes on.
    async fn set_limits(&self, volume: &StoredVolume) -> Result<Outcome, Failure>;

    /// Whether volumes are as they were made; changes nothing. An error is about the VM
    /// as a whole.
    async fn look(&self, volumes: &[LookedAt]) -> Result<BTreeMap<VolumeName, Sight>, Failure>;

    /// Tells what may have changed, until it is dropped.
    async fn watch(&self, stirs: mpsc::Sender<Stir>);

    /// Goes the whole way back, from wherever an attach came to.
    async fn detach(&self, volume: &VolumeSpec, options: RemoveOptions) -> Result<(), Failure>;
}

/// What the handler knows of a volume that it has attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Circumstances {
    /// It was attached before.
    pub returns: bool,
    /// The VM is about to start: while it does not run, all is done that can be done without it.
    pub starting: bool,
    /// libvirt is starting it, and answers nothing before that: it is not asked.
    pub libvirt_waits: bool,
}

/// How far an attach came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// The guest has it.
    ToGuest,
    /// Node and grant wait for a VM that is about to start.
    ToPod,
}

/// An attach that did not succeed.
#[derive(Debug)]
pub struct AttachFailure {
    /// Why.
    pub failure: Failure,
    /// What is there of it.
    pub left: Left,
}

/// A volume that has followed its LUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grown {
    /// Bytes before.
    pub before: u64,
    /// Bytes now.
    pub size: u64,
    /// The size that it must have from now on; `None` where that has not changed.
    pub expect_size: Option<u64>,
}

/// An expand that did not come to its end.
#[derive(Debug)]
pub struct ExpandFailure {
    /// Why.
    pub failure: Failure,
    /// The size that the volume must have from now on; `None` where that has not changed.
    pub expect_size: Option<u64>,
}

/// A volume that is looked at.
#[derive(Debug, Clone)]
pub struct LookedAt {
    /// The volume.
    pub volume: StoredVolume,
    /// Nobody knows whether it was ready: that it is right must be proven as an attach proves it.
    pub anew: bool,
}

/// What a look found of one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sight {
    /// It is as it was made.
    Right {
        /// What is attached.
        attachment: Attachment,
        /// How its paths are.
        paths: Paths,
        /// Its target name in the domain.
        target: Option<String>,
    },
    /// Something of it is not, in these words.
    Differs(String),
    /// It could not be seen.
    Unclear(Failure),
}

/// Something has happened that volumes may have to be looked at for.
#[derive(Debug, Clone)]
pub enum Stir {
    /// The VM may have gone or come back, or its libvirt.
    Vm,
    /// The domain has lost a disk of ours, or nobody knows what it has lost.
    Disks,
    /// The host's devices have changed.
    Storage(Arc<Touched>),
}
