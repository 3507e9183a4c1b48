import purerpc
import sgpu.api.v1alpha_pb2 as sgpu_dot_api_dot_v1alpha__pb2


class RegistrationServicer(purerpc.Servicer):
    async def Register(self, input_message):
        raise NotImplementedError()

    @property
    def service(self) -> purerpc.Service:
        service_obj = purerpc.Service(
            "deviceplugin.Registration"
        )
        service_obj.add_method(
            "Register",
            self.Register,
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_UNARY,
                sgpu_dot_api_dot_v1alpha__pb2.RegisterRequest,
                sgpu_dot_api_dot_v1alpha__pb2.Empty,
            )
        )
        return service_obj


class RegistrationStub:
    def __init__(self, channel):
        self._client = purerpc.Client(
            "deviceplugin.Registration",
            channel
        )
        self.Register = self._client.get_method_stub(
            "Register",
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_UNARY,
                sgpu_dot_api_dot_v1alpha__pb2.RegisterRequest,
                sgpu_dot_api_dot_v1alpha__pb2.Empty,
            )
        )


class DevicePluginServicer(purerpc.Servicer):
    async def ListAndWatch(self, input_message):
        raise NotImplementedError()

    async def Allocate(self, input_message):
        raise NotImplementedError()

    @property
    def service(self) -> purerpc.Service:
        service_obj = purerpc.Service(
            "deviceplugin.DevicePlugin"
        )
        service_obj.add_method(
            "ListAndWatch",
            self.ListAndWatch,
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_STREAM,
                sgpu_dot_api_dot_v1alpha__pb2.Empty,
                sgpu_dot_api_dot_v1alpha__pb2.ListAndWatchResponse,
            )
        )
        service_obj.add_method(
            "Allocate",
            self.Allocate,
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_UNARY,
                sgpu_dot_api_dot_v1alpha__pb2.AllocateRequest,
                sgpu_dot_api_dot_v1alpha__pb2.AllocateResponse,
            )
        )
        return service_obj


class DevicePluginStub:
    def __init__(self, channel):
        self._client = purerpc.Client(
            "deviceplugin.DevicePlugin",
            channel
        )
        self.ListAndWatch = self._client.get_method_stub(
            "ListAndWatch",
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_STREAM,
                sgpu_dot_api_dot_v1alpha__pb2.Empty,
                sgpu_dot_api_dot_v1alpha__pb2.ListAndWatchResponse,
            )
        )
        self.Allocate = self._client.get_method_stub(
            "Allocate",
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_UNARY,
                sgpu_dot_api_dot_v1alpha__pb2.AllocateRequest,
                sgpu_dot_api_dot_v1alpha__pb2.AllocateResponse,
            )
        )