/* A libnvidia-ml for tests: every function that proto/nvml/nvml.h declares, answering from a text file.
 *
 * The file lies beside the library and may be replaced at any time; each call reads it again when it has changed.
 * It has lines of `key=value`; tests/stub_driver.py writes them:
 *
 *     driver_version=550.54.15
 *     gpus=2                             how many there are; gpu.0=UUID and gpu.1=UUID say which
 *     UUID.name=Tesla T4                 one fact of one GPU; see StubGpu for all of them
 *     UUID.compute=2                     how many entries a list of a GPU has; UUID.compute.0=PID BYTES is the first
 *     process_surplus=8                  bytes by which the _v3 functions make an entry of such a list longer (negative: shorter)
 *     call.nvmlInit=9                    answer this code, or "hang", or "crash"; without a variant's suffix: all variants
 *     call.nvmlDeviceGetName.UUID=15     the same, for one GPU
 *     UUID.mig.3=MIG-UUID                the MIG instance at an index; its facts stand under its own UUID
 *     dev=/dev                           where the GPUs' device nodes are: they are opened until the library is shut down,
 *                                        and a GPU whose node can't be opened is none
 *     limits=dmem                        who keeps memory limits: dmem, misc, or lies, which says that it does and does not
 *     UUID.limit_used.NAME=4096          bytes that the processes in the cgroup directory of that name use
 *     events=1                           how many there have been; event.1=UUID TYPE DATA GI CI says which
 *
 * A file `calls` beside the library, where there is one, gets a line for each call: the function, and the GPU's UUID.
 * What this file must not know: Python, sgpu, and anything that is better said in the state.
 */
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "nvml.h"

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    TIMEOUT = 10,
    GPU_IS_LOST = 15,
    OPERATING_SYSTEM = 17,
    ARGUMENT_VERSION_MISMATCH = 25,
};

enum { MOST_GPUS = 8192, VALUE = 256 }; /* MIG instances of all times among them */

/* A handle is the address of a slot, and a slot belongs to one UUID for as long as the library is loaded. */
struct nvmlDevice_st {
    char uuid[VALUE];
};
struct nvmlEventSet_st {
    int watch; /* of the files beside this library */
    unsigned long long next; /* the first event that this set has not looked at */
    struct {
        unsigned long long types;
        unsigned long long since; /* NVML does not record what happened before the registration */
    } registered[MOST_GPUS];
};

static struct nvmlDevice_st slots[MOST_GPUS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* held by every call, except while it waits */
static unsigned int initialized;
static int opened[MOST_GPUS]; /* by slot, the descriptor of its device node; 0: not open */

/* ---- the state file ---- */

static char *state; /* begins with a newline, so that every line does */
static struct stat state_read;

/* The path of a file beside this library. */
static void beside(char path[PATH_MAX], const char *name)
{
    Dl_info self = {0};
    dladdr(&lock, &self);
    const char *slash = strrchr(self.dli_fname, '/');
    snprintf(path, PATH_MAX, "%.*s%s", slash ? (int)(slash + 1 - self.dli_fname) : 0, self.dli_fname, name);
}

static void reload(void)
{
    char path[PATH_MAX];
    beside(path, "state");
    struct stat found;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    /* Whoever writes the file gives each version a modification time of its own, to the nanosecond. */
    if (fstat(file, &found) == 0
        && (!state || found.st_ino != state_read.st_ino || found.st_mtim.tv_sec != state_read.st_mtim.tv_sec
            || found.st_mtim.tv_nsec != state_read.st_mtim.tv_nsec)) {
        char *text = calloc(1, found.st_size + 2);
        text[0] = '\n';
        if (read(file, text + 1, found.st_size) == found.st_size) {
            free(state);
            state = text;
            state_read = found;
        } else {
            free(text);
        }
    }
    close(file);
}

/* The value of the line `key=value`; false where there is none. */
__attribute__((format(printf, 2, 3))) static bool look(char value[VALUE], const char *format, ...)
{
    char key[2 * VALUE + 2] = "\n";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(key + 1, 2 * VALUE, format, arguments);
    va_end(arguments);
    strcat(key, "=");
    const char *line = state ? strstr(state, key) : NULL;
    if (!line)
        return false;
    line += strlen(key);
    snprintf(value, VALUE, "%.*s", (int)strcspn(line, "\n"), line);
    return true;
}

/* A number of the driver's own; 0 where the state lacks it. */
static unsigned long long number(const char *key)
{
    char value[VALUE] = "0";
    look(value, "%s", key);
    return strtoull(value, NULL, 0);
}

/* A fact of one GPU, as text (empty where the state lacks it) and as a number. */
static const char *fact(char value[VALUE], nvmlDevice_t device, const char *key)
{
    value[0] = 0;
    look(value, "%s.%s", device->uuid, key);
    return value;
}

static unsigned long long fact_number(nvmlDevice_t device, const char *key)
{
    char value[VALUE];
    return strtoull(fact(value, device, key), NULL, 0);
}

/* ---- what every call does first ---- */

static nvmlDevice_t slot(const char *uuid)
{
    for (int i = 0; i < MOST_GPUS; i++) {
        if (!slots[i].uuid[0])
            strcpy(slots[i].uuid, uuid);
        if (strcmp(slots[i].uuid, uuid) == 0)
            return &slots[i];
    }
    abort(); /* more GPUs than any test has */
}

static void note_call(const char *function, nvmlDevice_t device)
{
    char path[PATH_MAX], line[2 * VALUE];
    beside(path, "calls");
    int file = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (file < 0)
        return;
    int length = snprintf(line, sizeof line, "%s %s\n", function, device ? device->uuid : "");
    if (write(file, line, length) != length) /* one write: lines of several processes never mix */
        abort();
    close(file);
}

static void nap(void)
{
    pthread_mutex_unlock(&lock);
    usleep(1000);
    pthread_mutex_lock(&lock);
}

/* What the state says of this function by that name: for this GPU, or for all. */
static bool told(char how[VALUE], const char *function, nvmlDevice_t device)
{
    return (device && look(how, "call.%s.%s", function, device->uuid)) || look(how, "call.%s", function);
}

/* The code that the state wants answered, SUCCESS to go on; hangs or crashes where it says so. */
static nvmlReturn_t steered(const char *function, nvmlDevice_t device)
{
    char how[VALUE], base[VALUE];
    snprintf(base, sizeof base, "%.*s", (int)(strstr(function, "_v") ? strstr(function, "_v") - function : VALUE - 1), function);
    for (;; nap()) {
        reload();
        if (!told(how, function, device) && !told(how, base, device))
            return SUCCESS;
        if (strcmp(how, "crash") == 0)
            abort();
        if (strcmp(how, "hang") != 0)
            return atoi(how);
    }
}

static nvmlReturn_t enter(const char *function, nvmlDevice_t device)
{
    pthread_mutex_lock(&lock);
    note_call(function, device);
    nvmlReturn_t code = steered(function, device);
    bool always = strncmp(function, "nvmlInit", strlen("nvmlInit")) == 0 || strcmp(function, "nvmlShutdown") == 0;
    return code == SUCCESS && !initialized && !always ? UNINITIALIZED : code;
}

static bool is_instance(nvmlDevice_t device)
{
    return strncmp(device->uuid, "MIG-", strlen("MIG-")) == 0;
}

static nvmlReturn_t gpu_state(nvmlDevice_t device)
{
    char value[VALUE];
    if (is_instance(device)) /* one that was destroyed has no facts */
        return *fact(value, device, "parent") ? gpu_state(slot(value)) : INVALID_ARGUMENT;
    return strcmp(fact(value, device, "lost"), "0") == 0 ? SUCCESS : GPU_IS_LOST; /* a GPU that vanished has no facts */
}

static nvmlReturn_t enter_gpu(const char *function, nvmlDevice_t device)
{
    bool ours = device >= slots && device < slots + MOST_GPUS && device->uuid[0];
    nvmlReturn_t code = enter(function, ours ? device : NULL);
    if (code != SUCCESS)
        return code;
    return ours ? gpu_state(device) : INVALID_ARGUMENT;
}

static void leave(const int *unused)
{
    (void)unused;
    pthread_mutex_unlock(&lock);
}

/* The first line of each function; the lock is released however the function returns. */
#define BEGIN(entered)                                               \
    __attribute__((cleanup(leave), unused)) const int inside = 0;    \
    const nvmlReturn_t refused = entered;                            \
    if (refused != SUCCESS)                                          \
        return refused
#define ENTER() BEGIN(enter(__func__, NULL))
#define ENTER_GPU(device) BEGIN(enter_gpu(__func__, device))
/* A function whose second variant takes and does the same as the first. */
#define BOTH(function, parameters, body)             \
    nvmlReturn_t function##_v2 parameters { ENTER(); body } \
    nvmlReturn_t function parameters { ENTER(); body }

static nvmlReturn_t text(char *target, unsigned int length, const char *value)
{
    if (strlen(value) >= length)
        return INSUFFICIENT_SIZE;
    strcpy(target, value);
    return SUCCESS;
}

/* ---- the library ---- */

const char *nvmlErrorString(nvmlReturn_t result)
{
    /* The words of driver 535, which knows the codes up to 27. */
    static const char *const words[] = {
        "Success", "Uninitialized", "Invalid Argument", "Not Supported", "Insufficient Permissions",
        "Already Initialized", "Not Found", "Insufficient Size", "Insufficient External Power",
        "Driver Not Loaded", "Timeout", "Interrupt Request Issue", "NVML Shared Library Not Found",
        "Function Not Found", "Corrupted infoROM", "GPU is lost", "GPU requires reset",
        "GPU access blocked by the operating system", "Driver/library version mismatch",
        "In use by another client", "Insufficient Memory", "No data", "vGPU ECC not supported",
        "Insufficient Resources", "Invalid Frequency", "Argument version mismatch",
        "Requested functionality has been deprecated", "System is not in ready state",
    };
    const int known = sizeof words / sizeof *words;
    return result >= 0 && result < known ? words[result] : "Unknown Error";
}

/* Open the device node of a GPU, where it has one and it can be opened; one that is not there is made, as NVML does. */
static void attach(nvmlDevice_t device)
{
    char directory[VALUE], path[PATH_MAX];
    if (!look(directory, "dev") || opened[device - slots])
        return;
    snprintf(path, sizeof path, "%s/nvidia%llu", directory, fact_number(device, "minor"));
    mknod(path, S_IFCHR | 0600, makedev(1, 3)); /* /dev/null */
    int file = open(path, O_RDONLY | O_CLOEXEC);
    opened[device - slots] = file < 0 ? 0 : file;
}

/* Whether this process may use a GPU. */
static bool attached(nvmlDevice_t device)
{
    char directory[VALUE];
    return !look(directory, "dev") || opened[device - slots];
}

/* By index, as of the last count: a GPU keeps its place while a poll goes on, though another leaves. */
static char listed[MOST_GPUS][VALUE];
static unsigned int listed_count;

static unsigned int list_gpus(void)
{
    listed_count = 0;
    for (unsigned int index = 0; index < number("gpus") && index < MOST_GPUS; index++) /* lost ones too */
        if (look(listed[listed_count], "gpu.%u", index) && attached(slot(listed[listed_count])))
            listed_count++;
    return listed_count;
}

static nvmlReturn_t init(void)
{
    char uuid[VALUE];
    initialized++;
    for (unsigned int index = 0; look(uuid, "gpu.%u", index); index++)
        attach(slot(uuid));
    return SUCCESS;
}

BOTH(nvmlInit, (void), return init();)

nvmlReturn_t nvmlShutdown(void)
{
    ENTER();
    if (initialized) /* NVML counts, and forgives a shutdown too many */
        initialized--;
    for (int i = 0; !initialized && i < MOST_GPUS; i++)
        if (opened[i]) {
            close(opened[i]);
            opened[i] = 0;
        }
    return SUCCESS;
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length)
{
    ENTER();
    char value[VALUE] = "";
    look(value, "driver_version");
    return text(version, length, value);
}

BOTH(nvmlDeviceGetCount, (unsigned int *count), *count = list_gpus(); return SUCCESS;)

static nvmlReturn_t handle(const char *function, nvmlDevice_t found, nvmlDevice_t *device)
{
    nvmlReturn_t code = steered(function, found);
    if (code == SUCCESS)
        code = gpu_state(found);
    if (code == SUCCESS)
        *device = found;
    return code;
}

static nvmlReturn_t by_index(const char *function, unsigned int index, nvmlDevice_t *device)
{
    if (index >= listed_count && index >= list_gpus())
        return INVALID_ARGUMENT;
    return handle(function, slot(listed[index]), device);
}

BOTH(nvmlDeviceGetHandleByIndex, (unsigned int index, nvmlDevice_t *device), return by_index(__func__, index, device);)

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length)
{
    ENTER_GPU(device);
    return text(uuid, length, device->uuid);
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length)
{
    ENTER_GPU(device);
    char value[VALUE];
    return text(name, length, fact(value, device, "name"));
}

/* What all variants fill in. The structure of the first two has no busId, so they leave it as it is. */
static nvmlReturn_t pci_info(nvmlDevice_t device, nvmlPciInfo_t *pci)
{
    char value[VALUE];
    if (sscanf(fact(value, device, "bus_id"), "%x:%x:%x", &pci->domain, &pci->bus, &pci->device) != 3)
        return NOT_SUPPORTED;
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "%04X:%02X:%02X.0", pci->domain, pci->bus, pci->device);
    pci->pciDeviceId = 0x1eb810de; /* a Tesla T4 */
    pci->pciSubSystemId = 0x12a210de;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci)
{
    ENTER_GPU(device);
    char value[VALUE];
    nvmlReturn_t code = text(pci->busId, sizeof pci->busId, fact(value, device, "bus_id"));
    return code == SUCCESS ? pci_info(device, pci) : code;
}

#define OLD_PCI_INFO(function) \
    nvmlReturn_t function(nvmlDevice_t device, nvmlPciInfo_t *pci) { ENTER_GPU(device); return pci_info(device, pci); }
OLD_PCI_INFO(nvmlDeviceGetPciInfo_v2)
OLD_PCI_INFO(nvmlDeviceGetPciInfo)

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    ENTER_GPU(device);
    if (memory->version != (sizeof *memory | 2 << 24))
        return ARGUMENT_VERSION_MISMATCH;
    memory->total = fact_number(device, "total");
    memory->reserved = fact_number(device, "reserved");
    memory->used = fact_number(device, "used");
    memory->free = memory->total - memory->reserved - memory->used;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    ENTER_GPU(device);
    memory->total = fact_number(device, "total");
    memory->used = fact_number(device, "used") + fact_number(device, "reserved");
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

/* ---- memory limits: a file beside the library for each GPU and cgroup, as the kernel keeps them until it is removed ---- */

static const unsigned long long NO_LIMIT = ~0ULL;

/* The path of the file; false where there is no such directory. A new directory may have the inode of an old one. */
static bool limit_file(char path[PATH_MAX], nvmlDevice_t device, const char *directory)
{
    struct statx found;
    if (statx(AT_FDCWD, directory, 0, STATX_INO | STATX_BTIME, &found) != 0 || !S_ISDIR(found.stx_mode))
        return false;
    char name[2 * VALUE];
    snprintf(name, sizeof name, "limit.%s.%x.%llx.%llx.%x", device->uuid, found.stx_dev_minor,
             (unsigned long long)found.stx_ino, (unsigned long long)found.stx_btime.tv_sec, found.stx_btime.tv_nsec);
    beside(path, name);
    return true;
}

nvmlReturn_t nvmlDeviceSetMemoryLimits_v1(nvmlDevice_t device, nvmlSetMemoryLimits_v1_t *limits)
{
    ENTER_GPU(device);
    char path[PATH_MAX], backend[VALUE] = "none";
    look(backend, "limits");
    if (strcmp(backend, "none") == 0)
        return NOT_SUPPORTED;
    if (!limit_file(path, device, limits->nameSpace))
        return OPERATING_SYSTEM;
    unsigned long long hard = limits->hardLimit;
    if (limits->softLimit > hard || (hard != NO_LIMIT && hard > fact_number(device, "total")))
        return INVALID_ARGUMENT;
    if (strcmp(backend, "lies") == 0)
        return SUCCESS;
    if (hard == NO_LIMIT) {
        unlink(path);
        return SUCCESS;
    }
    FILE *file = fopen(path, "w");
    if (!file)
        return NO_PERMISSION;
    fprintf(file, "%llu", hard);
    fclose(file);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryLimits_v1(nvmlDevice_t device, nvmlGetMemoryLimits_v1_t *limits)
{
    ENTER_GPU(device);
    char path[PATH_MAX], backend[VALUE] = "none", used[VALUE] = "0";
    look(backend, "limits");
    if (strcmp(backend, "none") == 0)
        return NOT_SUPPORTED;
    if (!limit_file(path, device, limits->nameSpace))
        return OPERATING_SYSTEM;
    FILE *file = fopen(path, "r");
    if (!file)
        return strcmp(backend, "misc") == 0 ? NOT_SUPPORTED : NOT_FOUND;
    limits->softLimit = 0;
    if (fscanf(file, "%llu", &limits->hardLimit) != 1)
        limits->hardLimit = NO_LIMIT;
    fclose(file);
    look(used, "%s.limit_used.%s", device->uuid, strrchr(limits->nameSpace, '/') + 1);
    limits->currentUsed = strtoull(used, NULL, 0);
    return SUCCESS;
}

/* A fact that is "none" is one that this GPU does not support. */
#define SUPPORTED(device, key) \
    do { \
        char none_[VALUE]; \
        if (strcmp(fact(none_, device, key), "none") == 0) \
            return NOT_SUPPORTED; \
    } while (0)

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *utilization)
{
    ENTER_GPU(device);
    SUPPORTED(device, "utilization");
    utilization->gpu = fact_number(device, "utilization");
    utilization->memory = 0;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t *values)
{
    ENTER_GPU(device);
    for (int i = 0; i < count; i++) {
        char value[VALUE];
        bool known = values[i].fieldId == 230 && strcmp(fact(value, device, "recovery_action"), "none") != 0;
        values[i].nvmlReturn = known ? SUCCESS : NOT_SUPPORTED;
        values[i].valueType = 1; /* unsigned int */
        if (known)
            values[i].value.uiVal = fact_number(device, "recovery_action");
    }
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t device, unsigned int *correctable, unsigned int *uncorrectable,
                                       unsigned int *pending, unsigned int *failed)
{
    ENTER_GPU(device);
    SUPPORTED(device, "rows_pending");
    *correctable = *uncorrectable = 0;
    *pending = fact_number(device, "rows_pending");
    *failed = fact_number(device, "rows_failed");
    return SUCCESS;
}

/* A function that answers one number, once `first` has let it. */
#define NUMBER(function, type, key, first)                    \
    nvmlReturn_t function(nvmlDevice_t device, type *answer) \
    {                                                         \
        ENTER_GPU(device);                                    \
        first;                                                \
        *answer = fact_number(device, key);                   \
        return SUCCESS;                                       \
    }

NUMBER(nvmlDeviceGetMinorNumber, unsigned int, "minor", )
NUMBER(nvmlDeviceGetRetiredPagesPendingStatus, nvmlEnableState_t, "pages_pending", SUPPORTED(device, "pages_pending"))

nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(nvmlDevice_t device, nvmlGpuFabricInfo_v2_t *info)
{
    ENTER_GPU(device);
    if (info->version != (sizeof *info | 2 << 24))
        return ARGUMENT_VERSION_MISMATCH;
    SUPPORTED(device, "fabric_state");
    info->status = fact_number(device, "fabric_status");
    info->state = fact_number(device, "fabric_state");
    return SUCCESS;
}

/* The number of entries of a list of a GPU, if there is room for them. */
#define ROOM(device, list, room, entries)          \
    do {                                           \
        unsigned int there_ = fact_number(device, list); \
        bool fits_ = *(room) >= there_;            \
        *(room) = there_;                          \
        if (!fits_)                                \
            return INSUFFICIENT_SIZE;              \
        if (there_ && !(entries))                  \
            return INVALID_ARGUMENT;               \
    } while (0)

static void entry(nvmlDevice_t device, const char *list, unsigned int index, unsigned long long numbers[3])
{
    char value[VALUE] = "";
    look(value, "%s.%s.%u", device->uuid, list, index);
    if (sscanf(value, "%llu %llu %llu", numbers, numbers + 1, numbers + 2) < 2)
        abort();
}

static nvmlReturn_t processes_v1(nvmlDevice_t device, const char *list, unsigned int *room, nvmlProcessInfo_v1_t *infos)
{
    SUPPORTED(device, list);
    ROOM(device, list, room, infos);
    for (unsigned int i = 0; i < *room; i++) {
        unsigned long long numbers[3];
        entry(device, list, i, numbers);
        infos[i] = (nvmlProcessInfo_v1_t){.pid = numbers[0], .usedGpuMemory = numbers[1]};
    }
    return SUCCESS;
}

static nvmlReturn_t processes_v2(nvmlDevice_t device, const char *list, unsigned int *room, void *infos, size_t surplus)
{
    SUPPORTED(device, list);
    ROOM(device, list, room, infos);
    const size_t size = sizeof(nvmlProcessInfo_v2_t) + surplus;
    for (unsigned int i = 0; i < *room; i++) {
        unsigned long long numbers[3];
        entry(device, list, i, numbers);
        nvmlProcessInfo_v2_t info = {numbers[0], numbers[1], 0xFFFFFFFF, 0xFFFFFFFF}; /* the whole GPU */
        memset((char *)infos + i * size, 0, size);
        memcpy((char *)infos + i * size, &info, size < sizeof info ? size : sizeof info);
    }
    return SUCCESS;
}

#define PROCESSES(function, list)                                                                    \
    nvmlReturn_t function##_v3(nvmlDevice_t device, unsigned int *room, nvmlProcessInfo_v2_t *infos) \
    {                                                                                                \
        ENTER_GPU(device);                                                                           \
        return processes_v2(device, list, room, infos, number("process_surplus"));                   \
    }                                                                                                \
    nvmlReturn_t function##_v2(nvmlDevice_t device, unsigned int *room, nvmlProcessInfo_v2_t *infos) \
    {                                                                                                \
        ENTER_GPU(device);                                                                           \
        return processes_v2(device, list, room, infos, 0);                                           \
    }                                                                                                \
    nvmlReturn_t function(nvmlDevice_t device, unsigned int *room, nvmlProcessInfo_v1_t *infos)      \
    {                                                                                                \
        ENTER_GPU(device);                                                                           \
        return processes_v1(device, list, room, infos);                                              \
    }

PROCESSES(nvmlDeviceGetComputeRunningProcesses, "compute")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses, "graphics")
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses, "mps")

nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device, nvmlProcessUtilizationSample_t *samples,
                                             unsigned int *room, unsigned long long since)
{
    ENTER_GPU(device);
    SUPPORTED(device, "samples");
    ROOM(device, "samples", room, samples);
    unsigned int written = 0;
    for (unsigned int i = 0; i < *room; i++) {
        unsigned long long numbers[3] = {0}; /* process, percent, and when: 0 is a moment ago */
        entry(device, "samples", i, numbers);
        unsigned long long when = numbers[2] ? numbers[2] : since + 1;
        if (when > since || number("stale_samples"))
            samples[written++] = (nvmlProcessUtilizationSample_t){
                .pid = numbers[0], .timeStamp = when, .smUtil = numbers[1], .memUtil = 1};
    }
    *room = written;
    return written ? SUCCESS : NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending)
{
    ENTER_GPU(device);
    SUPPORTED(device, "mig_mode");
    *current = fact_number(device, "mig_mode");
    *pending = fact_number(device, "mig_pending");
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned int *count)
{
    ENTER_GPU(device);
    *count = fact_number(device, "mig_mode") ? fact_number(device, "mig_max") : 0;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned int index, nvmlDevice_t *instance)
{
    ENTER_GPU(device);
    char uuid[VALUE];
    if (!look(uuid, "%s.mig.%u", device->uuid, index))
        return NOT_FOUND;
    *instance = slot(uuid);
    return SUCCESS;
}

/* Questions that are only for MIG instances. A whole GPU answers as a real H200 does. */
#define INSTANCE(device, otherwise) \
    do { \
        if (!is_instance(device)) \
            return otherwise; \
    } while (0)

NUMBER(nvmlDeviceGetGpuInstanceId, unsigned int, "gpu_instance", INSTANCE(device, INVALID_ARGUMENT))
NUMBER(nvmlDeviceGetComputeInstanceId, unsigned int, "compute_instance", INSTANCE(device, INVALID_ARGUMENT))

nvmlReturn_t nvmlDeviceGetAttributes_v2(nvmlDevice_t device, nvmlDeviceAttributes_t *attributes)
{
    ENTER_GPU(device);
    INSTANCE(device, NOT_SUPPORTED);
    memset(attributes, 0, sizeof *attributes);
    attributes->gpuInstanceSliceCount = attributes->computeInstanceSliceCount = fact_number(device, "slices");
    attributes->memorySizeMB = fact_number(device, "total") >> 20;
    return SUCCESS;
}

NUMBER(nvmlDeviceGetSupportedEventTypes, unsigned long long, "event_types", )

nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, nvmlEventSet_t set)
{
    ENTER_GPU(device);
    if (types & ~fact_number(device, "event_types"))
        return NOT_SUPPORTED;
    if (!set->registered[device - slots].types)
        set->registered[device - slots].since = number("events");
    set->registered[device - slots].types |= types;
    return SUCCESS;
}

nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *set)
{
    ENTER();
    *set = calloc(1, sizeof **set);
    (*set)->next = number("events") + 1;
    char directory[PATH_MAX];
    beside(directory, "");
    (*set)->watch = inotify_init1(IN_CLOEXEC | IN_NONBLOCK); /* once: to close one takes the kernel some 20 ms */
    inotify_add_watch((*set)->watch, directory, IN_MOVED_TO);
    return SUCCESS;
}

static bool next_event(nvmlEventSet_t set, nvmlEventData_t *data)
{
    char value[VALUE], uuid[VALUE];
    while (look(value, "event.%llu", set->next)) {
        unsigned long long serial = set->next++;
        if (sscanf(value, "%s %llu %llu %u %u", uuid, &data->eventType, &data->eventData, &data->gpuInstanceId,
                   &data->computeInstanceId) != 5)
            abort();
        data->device = slot(uuid);
        if (set->registered[data->device - slots].types & data->eventType
            && serial > set->registered[data->device - slots].since)
            return true;
    }
    return false;
}

static unsigned long long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000ULL + time.tv_nsec / 1000000;
}

/* Sleeps until a file beside this library was replaced, which the state then may be: as a driver does, for what waiting
 * costs is measured. */
static void sleep_until_replaced(int watch, unsigned long long deadline)
{
    char events[4096];
    unsigned long long time = now();
    struct pollfd polled = {.fd = watch, .events = POLLIN};
    pthread_mutex_unlock(&lock);
    poll(&polled, 1, deadline > time ? deadline - time : 0);
    while (read(watch, events, sizeof events) > 0)
        ;
    pthread_mutex_lock(&lock);
}

static nvmlReturn_t wait_event(const char *function, nvmlEventSet_t set, nvmlEventData_t *data, unsigned int milliseconds)
{
    const unsigned long long deadline = now() + milliseconds;
    nvmlReturn_t code;
    for (;; sleep_until_replaced(set->watch, deadline)) {
        code = steered(function, NULL);
        if (code == SUCCESS && !initialized)
            code = UNINITIALIZED;
        if (code != SUCCESS || next_event(set, data))
            break;
        if (now() >= deadline) {
            code = TIMEOUT;
            break;
        }
    }
    return code;
}

BOTH(nvmlEventSetWait, (nvmlEventSet_t set, nvmlEventData_t *data, unsigned int milliseconds),
     return wait_event(__func__, set, data, milliseconds);)

nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set)
{
    ENTER();
    close(set->watch);
    free(set);
    return SUCCESS;
}
