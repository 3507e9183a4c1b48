import purerpc
import sgpu.api.pluginregistration_pb2 as sgpu_dot_api_dot_pluginregistration__pb2


class RegistrationServicer(purerpc.Servicer):
    async def GetInfo(self, input_message):
        raise NotImplementedError()

    async def NotifyRegistrationStatus(self, input_message):
        raise NotImplementedError()

    @property
    def service(self) -> purerpc.Service:
        service_obj = purerpc.Service(
            "pluginregistration.Registration"
        )
        service_obj.add_method(
            "GetInfo",
            self.GetInfo,
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_UNARY,
                sgpu_dot_api_dot_pluginregistration__pb2.InfoRequest,
                sgpu_dot_api_dot_pluginregistration__pb2.PluginInfo,
            )
        )
        service_obj.add_method(
            "NotifyRegistrationStatus",
            self.NotifyRegistrationStatus,
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_UNARY,
                sgpu_dot_api_dot_pluginregistration__pb2.RegistrationStatus,
                sgpu_dot_api_dot_pluginregistration__pb2.RegistrationStatusResponse,
            )
        )
        return service_obj


class RegistrationStub:
    def __init__(self, channel):
        self._client = purerpc.Client(
            "pluginregistration.Registration",
            channel
        )
        self.GetInfo = self._client.get_method_stub(
            "GetInfo",
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_UNARY,
                sgpu_dot_api_dot_pluginregistration__pb2.InfoRequest,
                sgpu_dot_api_dot_pluginregistration__pb2.PluginInfo,
            )
        )
        self.NotifyRegistrationStatus = self._client.get_method_stub(
            "NotifyRegistrationStatus",
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_UNARY,
                sgpu_dot_api_dot_pluginregistration__pb2.RegistrationStatus,
                sgpu_dot_api_dot_pluginregistration__pb2.RegistrationStatusResponse,
            )
        )