//! What libvirt offers only through its C API: the event loop, domain events, detach by alias, I/O
//! threads and limits, the kind of a job. The one file of this module with `unsafe` in it.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::domains::Domains;
use super::events::{DomainEvent, EventSender, Lifecycle};
use super::{IoThread, Job};
use crate::host::priority;
use crate::types::IoLimits;

/// Starts libvirt's event loop, once for the process and before the first connection (libvirt
/// wants it so); later calls return what the first came to.
pub(super) fn start_event_loop() -> Result<(), String> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            // Without this libvirt prints every error on stderr as well.
            virt::error::clear_error_callback();
            virt::event::event_register_default_impl().map_err(|e| e.to_string())?;
            std::thread::Builder::new()
                .name("libvirt-events".into())
                .spawn(|| {
                    priority::raise();
                    loop {
                        if let Err(error) = virt::event::event_run_default_impl() {
                            tracing::error!(%error, "libvirt's event loop failed once");
                            std::thread::sleep(std::time::Duration::from_millis(100));
                        }
                    }
                })
                .map_err(|e| e.to_string())?;
            Ok(())
        })
        .clone()
}

/// What the callbacks need: shared with libvirt, one reference for each registration.
struct Listener {
    events: EventSender,
    domains: Arc<Domains>,
    alive: Arc<AtomicBool>,
}

/// An open connection with its callbacks. Dropping it may block (it says goodbye to the daemon):
/// only ever on a thread that may.
pub(super) struct Handle {
    connect: Connect,
    domains: Arc<Domains>,
    callbacks: Vec<c_int>,
    closing: bool,
}

impl Handle {
    /// Opens a connection and registers for the events of all its domains.
    pub(super) fn open(
        uri: &str,
        events: EventSender,
        alive: Arc<AtomicBool>,
        keepalive: bool,
    ) -> Result<Self, Error> {
        let connect = Connect::open(Some(uri))?;
        if keepalive {
            // Every 5 s, gone after 3 unanswered ones. Not offered by every driver (test:///): then a
            // dead peer is noticed by the deadlines.
            let _ = connect.set_keep_alive(5, 3);
        }
        let domains = Arc::<Domains>::default();
        let listener = Arc::new(Listener { events, domains: Arc::clone(&domains), alive });
        let mut handle = Self { connect, domains, callbacks: Vec::new(), closing: false };
        handle.register_close(&listener);
        handle.register(sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle_callback(), &listener)?;
        for (id, callback) in [
            (sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, device_callback(on_added)),
            (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, device_callback(on_removed)),
            (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, device_callback(on_removal_failed)),
        ] {
            handle.register(id, callback, &listener)?;
        }
        Ok(handle)
    }

    /// The connection for safe calls.
    pub(super) fn connect(&self) -> &Connect {
        &self.connect
    }

    /// Does something with the domain of that name.
    pub(super) fn with_domain<T>(
        &self,
        name: &str,
        work: impl Fn(&Domain) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.domains.with(&self.connect, name, work)
    }

    fn register(
        &mut self,
        event: sys::virDomainEventID,
        callback: sys::virConnectDomainEventGenericCallback,
        listener: &Arc<Listener>,
    ) -> Result<(), Error> {
        let opaque = Arc::into_raw(Arc::clone(listener)).cast_mut().cast::<c_void>();
        // SAFETY: the connection is open; `callback` has the signature that this event asks for;
        // `opaque` is one reference to a Listener, which `release` gives back when libvirt has no
        // more use for it. A null domain means all domains.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                self.connect.as_ptr(),
                ptr::null_mut(),
                event as c_int,
                callback,
                opaque,
                Some(release),
            )
        };
        if id < 0 {
            let error = Error::last_error();
            // SAFETY: libvirt did not take the reference, as the registration failed.
            unsafe { release(opaque) };
            return Err(error);
        }
        self.callbacks.push(id);
        Ok(())
    }

    /// Not offered by every driver (test:///), so a failure is no error.
    fn register_close(&mut self, listener: &Arc<Listener>) {
        let opaque = Arc::into_raw(Arc::clone(listener)).cast_mut().cast::<c_void>();
        // SAFETY: as in `register`; `on_close` has the signature of virConnectCloseFunc.
        let result = unsafe {
            sys::virConnectRegisterCloseCallback(
                self.connect.as_ptr(),
                Some(on_close),
                opaque,
                Some(release),
            )
        };
        if result == 0 {
            self.closing = true;
        } else {
            // SAFETY: libvirt did not take the reference, as the registration failed.
            unsafe { release(opaque) };
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        for id in self.callbacks.drain(..) {
            // SAFETY: the connection is open and `id` is a registration of ours.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), id) };
        }
        if self.closing {
            // SAFETY: the connection is open and `on_close` was registered with it.
            unsafe {
                sys::virConnectUnregisterCloseCallback(self.connect.as_ptr(), Some(on_close))
            };
        }
        self.domains.clear();
    }
}

/// Asks for a device to be removed; the virt crate has no binding for this one.
pub(super) fn detach_alias(domain: &Domain, alias: &CStr, flags: c_uint) -> Result<(), Error> {
    // SAFETY: the domain is a live handle and `alias` ends with NUL; libvirt keeps neither.
    let result = unsafe { sys::virDomainDetachDeviceAlias(domain.as_ptr(), alias.as_ptr(), flags) };
    if result < 0 { Err(Error::last_error()) } else { Ok(()) }
}

/// Adds or removes an I/O thread; the virt crate has no binding for these.
pub(super) fn io_thread(
    domain: &Domain,
    id: u32,
    how: IoThread,
    flags: c_uint,
) -> Result<(), Error> {
    // SAFETY: the domain is a live handle; the other arguments are numbers.
    let result = unsafe {
        match how {
            IoThread::Add => sys::virDomainAddIOThread(domain.as_ptr(), id, flags),
            IoThread::Remove => sys::virDomainDelIOThread(domain.as_ptr(), id, flags),
        }
    };
    if result < 0 { Err(Error::last_error()) } else { Ok(()) }
}

/// Sets all I/O limits of a disk; the virt crate has no binding for this one.
pub(super) fn set_io_limits(
    domain: &Domain,
    disk: &CStr,
    limits: &IoLimits,
    flags: c_uint,
) -> Result<(), Error> {
    let mut params: sys::virTypedParameterPtr = ptr::null_mut();
    let (mut count, mut room): (c_int, c_int) = (0, 0);
    let mut result = 0;
    // The names are those of VIR_DOMAIN_BLOCK_IOTUNE_*.
    for (name, value) in limits.fields() {
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the out-parameters are valid for the call and describe one array, which libvirt
        // allocates and grows; `name` ends with NUL and is copied.
        let added = unsafe {
            sys::virTypedParamsAddULLong(
                &raw mut params,
                &raw mut count,
                &raw mut room,
                name.as_ptr(),
                value,
            )
        };
        result = result.min(added);
    }
    // SAFETY: the domain is a live handle, `disk` ends with NUL, and `params` has `count` entries;
    // libvirt keeps none of them. The array is given back once, by the function made for that.
    unsafe {
        if result == 0 {
            result =
                sys::virDomainSetBlockIoTune(domain.as_ptr(), disk.as_ptr(), params, count, flags);
        }
        let failed = (result < 0).then(Error::last_error);
        sys::virTypedParamsFree(params, count);
        failed.map_or(Ok(()), Err)
    }
}

/// What job a domain has, `None` when none. Not by `virt::Domain::job_stats`: that makes a Vec from
/// libvirt's null pointer when there is no job.
pub(super) fn job(domain: &Domain) -> Result<Option<Job>, Error> {
    let mut kind: c_int = 0;
    let mut params: sys::virTypedParameterPtr = ptr::null_mut();
    let mut count: c_int = 0;
    let mut operation: c_int = 0;
    let field: CString = c"operation".into(); // VIR_DOMAIN_JOB_OPERATION
    // SAFETY: the out-parameters are valid for the call; libvirt allocates `params` and tells their
    // number, and they are given back to it once, by the function made for that.
    let result = unsafe {
        let result = sys::virDomainGetJobStats(
            domain.as_ptr(),
            &raw mut kind,
            &raw mut params,
            &raw mut count,
            0,
        );
        if result == 0 && !params.is_null() {
            sys::virTypedParamsGetInt(params, count, field.as_ptr(), &raw mut operation);
            sys::virTypedParamsFree(params, count);
        }
        result
    };
    if result < 0 {
        return Err(Error::last_error());
    }
    let kind = kind as sys::virDomainJobType;
    if kind != sys::VIR_DOMAIN_JOB_BOUNDED && kind != sys::VIR_DOMAIN_JOB_UNBOUNDED {
        return Ok(None);
    }
    Ok(Some(match operation as sys::virDomainJobOperation {
        sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN
        | sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT => Job::Migration,
        sys::VIR_DOMAIN_JOB_OPERATION_BACKUP => Job::Backup,
        sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT
        | sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_REVERT
        | sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_DELETE => Job::Snapshot,
        _ => Job::Other,
    }))
}

type DeviceCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, *mut c_void);
type LifecycleCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;

fn device_callback(f: DeviceCallback) -> sys::virConnectDomainEventGenericCallback {
    // SAFETY: libvirt takes every event's callback as one generic function pointer and calls it with
    // the signature of the event that it was registered for (VIR_DOMAIN_EVENT_CALLBACK in C).
    Some(unsafe {
        std::mem::transmute::<
            DeviceCallback,
            unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void),
        >(f)
    })
}

fn lifecycle_callback() -> sys::virConnectDomainEventGenericCallback {
    // SAFETY: as in `device_callback`.
    Some(unsafe {
        std::mem::transmute::<
            LifecycleCallback,
            unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void),
        >(on_lifecycle)
    })
}

/// Hands an event on to whoever listens.
///
/// # Safety
/// `opaque` must be the Listener of a registration, `domain` what libvirt gave to the callback.
unsafe fn tell(opaque: *mut c_void, domain: sys::virDomainPtr, event: DomainEvent) {
    // SAFETY: the registration's reference keeps the Listener alive until `release`, which libvirt
    // does not call while a callback runs.
    let listener = unsafe { &*opaque.cast_const().cast::<Listener>() };
    // SAFETY: the domain is valid during the callback, and so is its name.
    let name = unsafe {
        let name = sys::virDomainGetName(domain);
        (!name.is_null()).then(|| CStr::from_ptr(name).to_string_lossy())
    };
    if let Some(name) = name {
        if let DomainEvent::Lifecycle(_) = event {
            listener.domains.forget(&name);
        }
        listener.events.send(&name, event);
    }
}

/// Copies a device's alias.
///
/// # Safety
/// `alias` must be null or a C string.
unsafe fn alias_of(alias: *const c_char) -> String {
    if alias.is_null() {
        return String::new();
    }
    // SAFETY: not null, so a C string, valid during the callback.
    unsafe { CStr::from_ptr(alias) }.to_string_lossy().into_owned()
}

unsafe extern "C" fn on_added(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: called by libvirt with what was registered.
    unsafe { tell(opaque, domain, DomainEvent::DeviceAdded(alias_of(alias))) };
}

unsafe extern "C" fn on_removed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: called by libvirt with what was registered.
    unsafe { tell(opaque, domain, DomainEvent::DeviceRemoved(alias_of(alias))) };
}

unsafe extern "C" fn on_removal_failed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: called by libvirt with what was registered.
    unsafe { tell(opaque, domain, DomainEvent::DeviceRemovalFailed(alias_of(alias))) };
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    _detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    let event = match event as sys::virDomainEventType {
        sys::VIR_DOMAIN_EVENT_DEFINED => Lifecycle::Defined,
        sys::VIR_DOMAIN_EVENT_UNDEFINED => Lifecycle::Undefined,
        sys::VIR_DOMAIN_EVENT_STARTED => Lifecycle::Started,
        sys::VIR_DOMAIN_EVENT_SUSPENDED => Lifecycle::Suspended,
        sys::VIR_DOMAIN_EVENT_RESUMED => Lifecycle::Resumed,
        sys::VIR_DOMAIN_EVENT_STOPPED => Lifecycle::Stopped,
        sys::VIR_DOMAIN_EVENT_SHUTDOWN => Lifecycle::Shutdown,
        _ => Lifecycle::Other,
    };
    // SAFETY: called by libvirt with what was registered.
    unsafe { tell(opaque, domain, DomainEvent::Lifecycle(event)) };
    0
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, _reason: c_int, opaque: *mut c_void) {
    // SAFETY: as in `tell`.
    let listener = unsafe { &*opaque.cast_const().cast::<Listener>() };
    if listener.alive.swap(false, Ordering::AcqRel) {
        listener.events.disconnected();
    }
}

unsafe extern "C" fn release(opaque: *mut c_void) {
    // SAFETY: `opaque` came from Arc::into_raw in a registration, and libvirt calls this once.
    drop(unsafe { Arc::from_raw(opaque.cast_const().cast::<Listener>()) });
}
