//! The calls: each validates, asks the façade and converts what it says.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use tracing::{Instrument, Span, info_span};

use super::convert;
use super::names;
use super::status::{self, About};
use super::v1::{self, lunplug_service_server::LunplugService};
use crate::reason::Reason;
use crate::spec::{AddOptions, RemoveOptions, VolumeSpec};
use crate::types::{Outcome, VmId, VolumeKey};
use crate::vm::facade::{Refusal, Volumes};
use crate::vm::resolve::Names;

/// Serves `lunplug.v1.LunplugService`.
pub struct Service {
    pub(super) volumes: Arc<dyn Volumes>,
    stopping: watch::Receiver<bool>,
}

impl Service {
    /// `stopping` turns true when streams have to end.
    pub fn new(volumes: Arc<dyn Volumes>, stopping: watch::Receiver<bool>) -> Self {
        Self { volumes, stopping }
    }

    /// Of a filter: the VM must be registered, or a typing error would look like "no volumes".
    async fn filter(&self, vm: Option<&v1::VmId>) -> Result<Option<VmId>, Refusal> {
        let Some(vm) = vm else { return Ok(None) };
        let vm = convert::vm_id("vm", Some(vm))?;
        if self.volumes.is_registered(&vm).await {
            return Ok(Some(vm));
        }
        Err(Refusal::new(Reason::VmNotFound, format!("no VM {vm} is registered here")).field("vm"))
    }

    async fn add(&self, request: v1::AddVolumeRequest) -> Result<v1::AddVolumeResponse, Refusal> {
        let vm = convert::vm_id("vm", request.vm.as_ref())?;
        let v1::AddVolumeRequest { volume: spec, accept_new_identity, dry_run, chap, .. } = request;
        let entry = v1::VolumeEntry { spec, accept_new_identity, chap };
        let (spec, options) = self.wanted(&vm, entry, dry_run).await?;
        let outcome = self.volumes.add_volume(&vm, spec, options).await?;
        let (volume, changed) = split(outcome);
        Ok(v1::AddVolumeResponse { volume: Some(convert::wire_volume(&volume)), changed })
    }

    /// A volume that is asked for, and how.
    pub(super) async fn wanted(
        &self,
        vm: &VmId,
        entry: v1::VolumeEntry,
        dry_run: bool,
    ) -> Result<(VolumeSpec, AddOptions), Refusal> {
        let names = self.resolved(vm, entry.spec.as_ref()).await?;
        let mut spec = convert::volume_spec(entry.spec, names)?;
        let chap = convert::chap(entry.chap, &mut spec)?;
        let accept_new_identity = entry.accept_new_identity;
        Ok((spec, AddOptions { chap, accept_new_identity, dry_run }))
    }

    /// What the names of a volume's portals are resolved to.
    async fn resolved(&self, vm: &VmId, volume: Option<&v1::VolumeSpec>) -> Result<Names, Refusal> {
        let wanted = volume.map(names::names).unwrap_or_default();
        if wanted.is_empty() {
            return Ok(Names::new());
        }
        let name = volume.and_then(|volume| volume.name.parse().ok());
        let key = name.map(|volume| VolumeKey { vm: vm.clone(), volume });
        let resolved = self.volumes.resolve(key.as_ref(), &wanted).await;
        resolved.map_err(|refusal| refusal.field("volume.source.iscsi.portals"))
    }

    async fn expand(
        &self,
        request: v1::ExpandVolumeRequest,
    ) -> Result<v1::ExpandVolumeResponse, Refusal> {
        let key = convert::volume_key(request.vm.as_ref(), &request.volume)?;
        let expected = convert::size("size_bytes", request.size_bytes)?;
        let (expanded, changed) = split(self.volumes.expand_volume(&key, expected).await?);
        Ok(v1::ExpandVolumeResponse {
            volume: Some(convert::wire_volume(&expanded.status)),
            size_before_bytes: expanded.before,
            size_bytes: expanded.size,
            changed,
        })
    }

    async fn limit(
        &self,
        request: v1::SetIoLimitsRequest,
    ) -> Result<v1::SetIoLimitsResponse, Refusal> {
        let key = convert::volume_key(request.vm.as_ref(), &request.volume)?;
        let limits = convert::io_limits("limits", request.limits)?;
        let (volume, changed) = split(self.volumes.set_io_limits(&key, limits).await?);
        Ok(v1::SetIoLimitsResponse { volume: Some(convert::wire_volume(&volume)), changed })
    }

    async fn remove(
        &self,
        request: v1::RemoveVolumeRequest,
    ) -> Result<v1::RemoveVolumeResponse, Refusal> {
        let key = convert::volume_key(request.vm.as_ref(), &request.volume)?;
        let options = RemoveOptions { force: request.force, dry_run: request.dry_run };
        let outcome = self.volumes.remove_volume(&key, options).await?;
        let (volume, changed) = split(outcome);
        Ok(v1::RemoveVolumeResponse { volume: Some(convert::wire_volume(&volume)), changed })
    }
}

pub(super) fn split<T>(outcome: Outcome<T>) -> (T, bool) {
    let changed = outcome.changed();
    (outcome.into_inner(), changed)
}

/// What a call is about as the caller wrote it, valid or not: an error must be able to say it.
fn about(vm: Option<&v1::VmId>, volume: &str) -> About {
    let vm = vm.map(|vm| match vm.namespace.as_str() {
        "" => format!("default/{}", vm.name),
        namespace => format!("{namespace}/{}", vm.name),
    });
    About { vm: vm.unwrap_or_default(), volume: volume.to_owned() }
}

/// One span a call. The operation's id ties the log lines of one call together, also those of the
/// handler that goes on with it.
fn span(call: &'static str, about: &About) -> Span {
    let operation = uuid::Uuid::new_v4().simple().to_string();
    info_span!("rpc", call, vm = about.vm, volume = about.volume, operation)
}

/// Runs a call in its span and turns a refusal into a status.
async fn answer<T>(
    call: &'static str,
    about: About,
    work: impl Future<Output = Result<T, Refusal>>,
) -> Result<Response<T>, Status> {
    let span = span(call, &about);
    async {
        match work.await {
            Ok(response) => {
                tracing::debug!("answered");
                Ok(Response::new(response))
            }
            Err(refusal) => {
                let (reason, field) = (refusal.reason.code(), refusal.field.as_deref());
                tracing::info!(reason, field, "refused: {refusal}");
                Err(status::status(&refusal, &about))
            }
        }
    }
    .instrument(span)
    .await
}

#[tonic::async_trait]
impl LunplugService for Service {
    async fn register_vm(
        &self,
        request: Request<v1::RegisterVmRequest>,
    ) -> Result<Response<v1::RegisterVmResponse>, Status> {
        let request = request.into_inner();
        let about = about(request.vm.as_ref().and_then(|vm| vm.id.as_ref()), "");
        answer("RegisterVm", about, async {
            let spec = convert::vm_spec(request.vm)?;
            let (vm, changed) = split(self.volumes.register_vm(spec).await?);
            Ok(v1::RegisterVmResponse { vm: Some(convert::wire_vm(&vm)), changed })
        })
        .await
    }

    async fn unregister_vm(
        &self,
        request: Request<v1::UnregisterVmRequest>,
    ) -> Result<Response<v1::UnregisterVmResponse>, Status> {
        let request = request.into_inner();
        answer("UnregisterVm", about(request.vm.as_ref(), ""), async {
            let vm = convert::vm_id("vm", request.vm.as_ref())?;
            let changed = self.volumes.unregister_vm(&vm).await?.changed();
            Ok(v1::UnregisterVmResponse { changed })
        })
        .await
    }

    async fn list_vms(
        &self,
        _: Request<v1::ListVmsRequest>,
    ) -> Result<Response<v1::ListVmsResponse>, Status> {
        answer("ListVms", About::default(), async {
            let vms = self.volumes.list_vms().await.iter().map(convert::wire_vm).collect();
            Ok(v1::ListVmsResponse { vms })
        })
        .await
    }

    async fn add_volume(
        &self,
        request: Request<v1::AddVolumeRequest>,
    ) -> Result<Response<v1::AddVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = request.volume.as_ref().map(|v| v.name.as_str()).unwrap_or_default();
        let about = about(request.vm.as_ref(), name);
        answer("AddVolume", about, self.add(request)).await
    }

    async fn remove_volume(
        &self,
        request: Request<v1::RemoveVolumeRequest>,
    ) -> Result<Response<v1::RemoveVolumeResponse>, Status> {
        let request = request.into_inner();
        let about = about(request.vm.as_ref(), &request.volume);
        answer("RemoveVolume", about, self.remove(request)).await
    }

    async fn add_volumes(
        &self,
        request: Request<v1::AddVolumesRequest>,
    ) -> Result<Response<v1::AddVolumesResponse>, Status> {
        let request = request.into_inner();
        let about = about(request.vm.as_ref(), "");
        answer("AddVolumes", about, self.add_many(request)).await
    }

    async fn remove_volumes(
        &self,
        request: Request<v1::RemoveVolumesRequest>,
    ) -> Result<Response<v1::RemoveVolumesResponse>, Status> {
        let request = request.into_inner();
        let about = about(request.vm.as_ref(), "");
        answer("RemoveVolumes", about, self.remove_many(request)).await
    }

    async fn sync_volumes(
        &self,
        request: Request<v1::SyncVolumesRequest>,
    ) -> Result<Response<v1::SyncVolumesResponse>, Status> {
        let request = request.into_inner();
        let about = about(request.vm.as_ref(), "");
        answer("SyncVolumes", about, self.sync(request)).await
    }

    async fn expand_volume(
        &self,
        request: Request<v1::ExpandVolumeRequest>,
    ) -> Result<Response<v1::ExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        let about = about(request.vm.as_ref(), &request.volume);
        answer("ExpandVolume", about, self.expand(request)).await
    }

    async fn set_io_limits(
        &self,
        request: Request<v1::SetIoLimitsRequest>,
    ) -> Result<Response<v1::SetIoLimitsResponse>, Status> {
        let request = request.into_inner();
        let about = about(request.vm.as_ref(), &request.volume);
        answer("SetIoLimits", about, self.limit(request)).await
    }

    async fn prepare_start(
        &self,
        request: Request<v1::PrepareStartRequest>,
    ) -> Result<Response<v1::PrepareStartResponse>, Status> {
        let request = request.into_inner();
        let about = about(request.vm.as_ref(), "");
        answer("PrepareStart", about, self.prepare(request)).await
    }

    async fn prepare_migration_target(
        &self,
        request: Request<v1::PrepareMigrationTargetRequest>,
    ) -> Result<Response<v1::PrepareMigrationTargetResponse>, Status> {
        let request = request.into_inner();
        let about = about(request.vm.as_ref(), "");
        answer("PrepareMigrationTarget", about, self.prepare_target(request)).await
    }

    async fn finish_migration(
        &self,
        request: Request<v1::FinishMigrationRequest>,
    ) -> Result<Response<v1::FinishMigrationResponse>, Status> {
        let request = request.into_inner();
        let about = about(request.vm.as_ref(), "");
        answer("FinishMigration", about, self.finish(request)).await
    }

    async fn cancel_migration(
        &self,
        request: Request<v1::CancelMigrationRequest>,
    ) -> Result<Response<v1::CancelMigrationResponse>, Status> {
        let request = request.into_inner();
        let about = about(request.vm.as_ref(), "");
        answer("CancelMigration", about, self.cancel(request)).await
    }

    async fn get_volume(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Result<Response<v1::GetVolumeResponse>, Status> {
        let request = request.into_inner();
        answer("GetVolume", about(request.vm.as_ref(), &request.volume), async {
            let key = convert::volume_key(request.vm.as_ref(), &request.volume)?;
            let volume = self.volumes.get_volume(&key).await?;
            Ok(v1::GetVolumeResponse { volume: Some(convert::wire_volume(&volume)) })
        })
        .await
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let request = request.into_inner();
        answer("ListVolumes", about(request.vm.as_ref(), ""), async {
            let vm = self.filter(request.vm.as_ref()).await?;
            let volumes = self.volumes.list_volumes(vm.as_ref()).await;
            Ok(v1::ListVolumesResponse {
                volumes: volumes.iter().map(|volume| convert::wire_volume(volume)).collect(),
            })
        })
        .await
    }

    type WatchVolumesStream =
        Pin<Box<dyn Stream<Item = Result<v1::WatchVolumesResponse, Status>> + Send>>;

    async fn watch_volumes(
        &self,
        request: Request<v1::WatchVolumesRequest>,
    ) -> Result<Response<Self::WatchVolumesStream>, Status> {
        let request = request.into_inner();
        answer("WatchVolumes", about(request.vm.as_ref(), ""), async {
            let vm = self.filter(request.vm.as_ref()).await?;
            let stream = super::watch::stream(self.volumes.clone(), vm, self.stopping.clone());
            Ok(Box::pin(stream) as Self::WatchVolumesStream)
        })
        .await
    }

    async fn discover_targets(
        &self,
        request: Request<v1::DiscoverTargetsRequest>,
    ) -> Result<Response<v1::DiscoverTargetsResponse>, Status> {
        let request = request.into_inner();
        answer("DiscoverTargets", About::default(), async {
            let mut request = request;
            if let Some(name) = names::name(&request.portal) {
                let resolved = self.volumes.resolve(None, &[name.clone()].into()).await;
                let resolved = resolved.map_err(|refusal| refusal.field("portal"))?;
                request.portal = resolved.get(&name).map(ToString::to_string).unwrap_or_default();
            }
            let (portal, with) = convert::discovery(request)?;
            let found = self.volumes.discover(portal, with).await?;
            let targets = found.iter().map(convert::wire_discovered).collect();
            Ok(v1::DiscoverTargetsResponse { targets })
        })
        .await
    }

    async fn get_node(
        &self,
        _: Request<v1::GetNodeRequest>,
    ) -> Result<Response<v1::GetNodeResponse>, Status> {
        answer("GetNode", About::default(), async {
            let node = self.volumes.node().await;
            Ok(v1::GetNodeResponse { node: Some(convert::wire_node(&node)) })
        })
        .await
    }
}
